"""`POST /v1/completions` and `/v1/chat/completions`: from a request to the engine's job, and from its pieces to
OpenAI's answers.

A chat is laid out as instruction tuning lays out conversations (see `data/questions.py`), so the answer's first token
reads the neighbors of the chunk that the last message ends with.
"""

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from megatron_retro.config.serving import LimitsGroup
from megatron_retro.data.questions import encoded as encoded_turns
from megatron_retro.data.questions import filled, filler, laid_out
from megatron_retro.inference.reader import GivenReader
from megatron_retro.inference.writer import Choice, Text
from megatron_retro.serving.answers import Answer, Piece
from megatron_retro.serving.engine import Engine, Job
from megatron_retro.serving.guard import Receive, Scope, Send, encoded
from megatron_retro.serving.opening import Opened
from megatron_retro.serving.requests import ChatRequest, CompletionRequest, Refusal, WritingRequest, invalid, read

_DEFAULTS = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "n": 1}  # OpenAI's
Asked = TypeVar("Asked", bound=WritingRequest)

_LATE = "the deadline passed before anything was written; ask for less, or later"


class Completions:
    """Answers completions.

    Args:
        engine: runs the model.
        opened: the model and what it reads.
        limits: of requests.
        retrieval: for requests that do not say.
        model_name: in requests and answers.
        place: is entered while a request waits or runs; refuses where there are too many.
    """

    def __init__(
        self,
        engine: Engine,
        opened: Opened,
        limits: LimitsGroup,
        retrieval: str,
        model_name: str,
        place: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self._engine, self._opened, self._limits = engine, opened, limits
        self._retrieval, self._model_name, self._place = retrieval, model_name, place

    async def answer(self, request: Request) -> Response:
        return _Completion(self, request, await self._asked(request, CompletionRequest))

    async def chat(self, request: Request) -> Response:
        return _ChatCompletion(self, request, await self._asked(request, ChatRequest))

    async def _asked(self, request: Request, kind: type[Asked]) -> tuple[Asked, float]:
        """(what is asked, when it must be answered)."""
        deadline = time.monotonic() + self._limits.deadline_seconds
        asked = read(await request.body(), kind)
        asked.check()
        if asked.model not in (None, self._model_name):
            raise Refusal(404, f"there is no such model; this is {self._model_name}", "model_not_found", param="model")
        return asked, deadline

    async def job(self, asked: WritingRequest, deadline: float, deliver: Callable[[Piece | None], None]) -> Job:
        """What the engine is to do.

        Raises:
            Refusal: it is more than may be asked.
        """
        settings = {name: _or(getattr(asked, name), value) for name, value in _DEFAULTS.items()}
        limits, param = self._limits, "messages" if isinstance(asked, ChatRequest) else "prompt"
        if settings["max_tokens"] > limits.max_new_tokens:
            raise invalid("max_tokens", f"max_tokens is {settings['max_tokens']}; at most {limits.max_new_tokens}")
        number = settings["n"] * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if number > limits.max_batch_size:
            raise invalid("n", f"that is {number} texts; at most {limits.max_batch_size}")
        reader = self._reader(asked.retrieval)
        encoded = await asyncio.to_thread(self._encoded, asked)
        if isinstance(asked, ChatRequest) and asked.ctxs and reader:
            reader = await asyncio.to_thread(self._given, asked.ctxs)
        longest = max(map(len, encoded))
        if longest > limits.max_prompt_tokens:
            raise invalid(param, f"a prompt has {longest} tokens; at most {limits.max_prompt_tokens}")
        if not all(encoded):
            raise invalid(param, "a prompt has no tokens; give at least a word to go on from")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
        choice = Choice(settings["temperature"], settings["top_k"], settings["top_p"], seed)
        answers = []
        for index in range(number):
            tokens = list(encoded[index // settings["n"]])
            text = Text(index, tokens, choice, index, settings["max_tokens"], reader)
            answers.append(Answer(index, text, self._opened.tokenizer, self._opened.library, asked.stops))
        return Job(answers, sum(map(len, encoded)), deadline, deliver)

    def _encoded(self, asked: WritingRequest) -> list[list[int]]:
        opened = self._opened
        if isinstance(asked, CompletionRequest):
            return opened.tokenizer.encode(asked.prompts)
        assert isinstance(asked, ChatRequest)
        turns, last = asked.dialog(opened.template)
        tokenizer, length = opened.tokenizer, opened.writer.chunk_length
        fill = filler(tokenizer)
        said, _ = laid_out(encoded_turns(turns, tokenizer), length, fill, tokenizer.eod)
        return [said + filled(tokenizer.encode([last])[0], length, fill, len(said))]

    def _given(self, texts: list[str]) -> GivenReader:
        writer = self._opened.writer
        k, length = writer.num_neighbors, 2 * writer.chunk_length
        return GivenReader(self._opened.tokenizer.encode(texts[:k]), k, length)

    def _reader(self, asked: str | None) -> Any:
        if not self._opened.readers:
            if asked not in (None, "off"):
                raise invalid("retrieval", "this model reads nothing; leave retrieval out")
            return None
        return self._opened.readers.get(asked or self._retrieval)


class _Completion(Response):
    """One answer, on its way: what the request holds is given back when it ends, in whatever way."""

    _id_begin, _object, _event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Completions, request: Request, asked_by: tuple[WritingRequest, float]):
        super().__init__()
        self._service, self._request, (self._asked, self._deadline) = service, request, asked_by
        self._id, self._created = f"{self._id_begin}-{uuid.uuid4().hex}", int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Refusal | None]()

        def deliver(piece: Piece | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            pieces.put_nowait(Refusal(499, "the client has left", "gone"))

        with self._service._place():
            job = await self._service.job(self._asked, self._deadline, deliver)
            watching = asyncio.create_task(watch())
            self._service._engine.submit(job)
            try:
                await self._send(job, pieces, send)
            finally:
                job.cancel()
                watching.cancel()

    async def _send(self, job: Job, queue: "asyncio.Queue[Piece | Refusal | None]", send: Send) -> None:
        pieces = self._pieces(job, queue)
        first = await anext(pieces)  # so that what goes wrong before has a status of its own
        if not self._asked.stream:
            await self._send_whole(job, [first] + [piece async for piece in pieces], send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._event(send, self._chunk(first))
        try:
            async for piece in pieces:
                await self._event(send, self._chunk(piece))
            if self._asked.wants_usage:
                await self._event(send, {**self._head(), "choices": [], "usage": _usage(job)})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        except Refusal as refusal:
            if refusal.status != 499:
                await self._event(send, refusal.as_json())
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, job: Job, queue: "asyncio.Queue[Piece | Refusal | None]") -> AsyncIterator[Piece]:
        """All pieces of all texts, as they come.

        Raises:
            Refusal: there will be no more.
        """
        unfinished = len(job.answers)
        wait: float | None = max(0.0, job.deadline - time.monotonic())
        while unfinished:
            try:
                piece = await asyncio.wait_for(queue.get(), wait)
            except asyncio.TimeoutError:
                raise Refusal(504, _LATE, "deadline") from None
            if piece is None:
                raise Refusal(500, "the model has failed", "server_error")
            if isinstance(piece, Refusal):
                raise piece
            if piece.text or piece.finish:
                wait = None  # the engine ends it in time
            unfinished -= piece.finish is not None
            yield piece

    async def _send_whole(self, job: Job, pieces: list[Piece], send: Send) -> None:
        wholes = [Piece(answer.index) for answer in job.answers]
        for piece in pieces:
            whole = wholes[piece.index]
            whole.text += piece.text
            whole.reads += piece.reads
            whole.finish = piece.finish or whole.finish
        choices = [self._choice(whole, "message") for whole in wholes]
        body = encoded({**self._head(), "object": self._object, "choices": choices, "usage": _usage(job)})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _event(self, send: Send, content: dict[str, Any]) -> None:
        await send({"type": "http.response.body", "body": b"data: " + encoded(content) + b"\n\n", "more_body": True})

    def _chunk(self, piece: Piece) -> dict[str, Any]:
        return {**self._head(), "choices": [self._choice(piece, "delta")]}

    def _head(self) -> dict[str, Any]:
        name = self._service._model_name
        return {"id": self._id, "object": self._event_object, "created": self._created, "model": name}

    def _choice(self, piece: Piece, part: str) -> dict[str, Any]:
        """A choice of an answer; `part` is what a chat calls its text: a whole "message", or a "delta"."""
        return {
            "index": piece.index,
            **self._text(piece.text, part),
            "logprobs": None,
            "finish_reason": piece.finish,
            "neighbors": list(piece.reads),
        }

    def _text(self, text: str, part: str) -> dict[str, Any]:
        return {"text": text}


class _ChatCompletion(_Completion):
    """An answer to messages."""

    _id_begin, _object, _event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    async def _pieces(self, job: Job, queue: "asyncio.Queue[Piece | Refusal | None]") -> AsyncIterator[Piece]:
        """As of any completion, but for the white space that parts an answer from its prompt."""
        begun = set()
        async for piece in super()._pieces(job, queue):
            if piece.index not in begun:
                piece.text = piece.text.lstrip()
            if piece.text:
                begun.add(piece.index)
            yield piece

    def _text(self, text: str, part: str) -> dict[str, Any]:
        return {part: {"role": "assistant", "content": text}}


def _usage(job: Job) -> dict[str, int]:
    read = job.num_prompt_tokens
    written = sum(answer.num_tokens for answer in job.answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
