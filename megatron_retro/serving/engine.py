"""The one thread that runs the model: requests wait in a queue, join the batch that is being written, and leave it."""

import collections
import itertools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable

from megatron_retro import distributed
from megatron_retro.inference.writer import Event, Text, Writer
from megatron_retro.serving.answers import Answer, Piece


class Job:
    """The texts of one request.

    Args:
        answers: its texts.
        num_prompt_tokens: of its prompts, each counted once.
        deadline: of `time.monotonic()`; what is being written then ends there.
        deliver: is called in the engine's thread with every piece, or with None when the engine has failed.
    """

    def __init__(
        self,
        answers: list[Answer],
        num_prompt_tokens: int,
        deadline: float,
        deliver: Callable[[Piece | None], None],
    ):
        self.answers, self.num_prompt_tokens = answers, num_prompt_tokens
        self.deadline, self.deliver = deadline, deliver

    def cancel(self) -> None:
        """From any thread: nobody waits for it any more."""
        for answer in self.answers:
            answer.text.is_cancelled = True


class Engine:
    """Serves jobs in the order they came, as many at once as fit into a batch.

    Args:
        writer: of the model.
        max_batch_size: texts written at once; no job has more.

    Attributes:
        tokens_read, tokens_written: of all jobs so far.
    """

    def __init__(self, writer: Writer, max_batch_size: int):
        self._writer, self._max_batch_size = writer, max_batch_size
        self._arrivals: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, tuple[Job, Answer]] = {}  # by the text's number
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.tokens_read = self.tokens_written = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is running goes on to its end, or is cancelled before."""
        self._arrivals.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return self._arrivals.qsize() + len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts."""
        return len(self._running)

    @property
    def model_seconds(self) -> float:
        return self._writer.model_seconds

    def submit(self, job: Job) -> None:
        """Queue a job, from any thread."""
        self._arrivals.put(job)

    # -------------------------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        distributed.use_this_ranks_share()  # threads have settings of their own
        while True:
            if not self._waiting:
                job = self._arrivals.get()
                if job is None:
                    return
                self._waiting.append(job)
            try:
                for event in self._writer.write_texts(self._arriving):
                    self._handle(event)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                self._fail()

    def _arriving(self) -> list[Text]:
        """The texts that fit into the batch; what is late ends, and what was cancelled is forgotten."""
        now = time.monotonic()
        for job, answer in self._running.values():
            if now > job.deadline:
                self._deliver(job, answer, answer.end())
        self._running = {
            number: (job, answer)
            for number, (job, answer) in self._running.items()
            if not (answer.text.is_cancelled or answer.finish)
        }
        while not self._arrivals.empty():
            arrived = self._arrivals.get()
            if arrived is None:  # it is met again when all is written
                self._arrivals.put(None)
                break
            self._waiting.append(arrived)
        texts: list[Text] = []
        while self._waiting and len(self._running) + len(self._waiting[0].answers) <= self._max_batch_size:
            job = self._waiting.popleft()
            for answer in job.answers:
                if not answer.text.is_cancelled:
                    answer.text.number = next(self._numbers)
                    self._running[answer.text.number] = (job, answer)
                    self.tokens_read += len(answer.text.tokens)
                    texts.append(answer.text)
        return texts

    def _handle(self, event: Event) -> None:
        self.tokens_written += event.token is not None
        if event.text in self._running:
            job, answer = self._running[event.text]
            self._deliver(job, answer, answer.add(event))

    def _deliver(self, job: Job, answer: Answer, piece: Piece) -> None:
        if piece.finish:
            answer.text.is_cancelled = True
        if piece:
            job.deliver(piece)

    def _fail(self) -> None:
        for job in {id(job): job for job, _ in self._running.values()}.values():
            job.cancel()
            job.deliver(None)
        self._running = {}
