"""Load a model, write on from prompts, and show the texts with what was read for them."""

import json
import pathlib
import sys
import time
from typing import Any

from megatron_retro import distributed, mcore, watch
from megatron_retro.config.generation import GenerateConfig
from megatron_retro.config.model import ParallelConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.data.tokenizer import Tokenizer
from megatron_retro.errors import UserError
from megatron_retro.inference.loading import Trained, check_same_tokenizer, load_trained
from megatron_retro.inference.reader import Reader, open_reader
from megatron_retro.inference.writer import Choice, Event, Writer
from megatron_retro.retrieval.corpora import open_tokenizer
from megatron_retro.retrieval.described import describe_neighbors
from megatron_retro.storage import check_writable, write_atomically
from megatron_retro.terminal import BOLD, DIM, PLAIN, printable, width
from megatron_retro.training.data import open_work_dir
from megatron_retro.workdir import STAGES, WorkDir

_KEPT = "\n\t"  # of the white space in texts


def generate(config: GenerateConfig) -> None:
    """Do what `tools/generate_retro_text.py` is asked; every rank calls it, rank 0 prints.

    Raises:
        UserError: flags, checkpoint and work dir do not fit together.
    """
    config.finish()
    prompts, given, sampling = config.prompts(), config.generation, config.sampling
    assert given.load and given.retro_work_dir
    model = open_model(config)
    if given.output:
        directory = pathlib.Path(given.output).absolute().parent
        distributed.together(lambda: check_writable("--output", directory))
    prompts = [prompt for prompt in prompts for _ in range(sampling.num_samples)]
    choice = Choice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
    start = time.perf_counter()
    texts = [Text(prompt, model) for prompt in prompts]
    encoded = model.tokenizer.encode(prompts)
    num_tokens = 0
    for event in model.writer.write(encoded, choice, sampling.max_new_tokens):
        texts[event.text].add(event)
        num_tokens += event.token is not None
    seconds = time.perf_counter() - start
    if distributed.rank() == 0:
        if config.reading.json:
            lines = "".join(json.dumps(text.as_json(), ensure_ascii=False) + "\n" for text in texts)
            if given.output:
                write_atomically(pathlib.Path(given.output), lambda file: file.write(lines.encode()))
            else:
                print(lines, end="")
        else:
            print("\n\n".join(text.as_text(config.reading.show_neighbors) for text in texts))
        share = model.writer.reading_seconds / seconds
        print(
            f"{num_tokens:,} tokens in {seconds:.1f} s, {num_tokens / seconds:,.1f} a second; "
            f"{share:.1%} of the time for retrieval",
            file=sys.stderr,
        )
    mcore.shut_down()


class OpenModel:
    """A trained model with its tokenizer and its database, ready to write.

    Attributes:
        table: the work dir's chunks.
    """

    def __init__(self, trained: Trained, table: ChunkTable, tokenizer: Tokenizer, writer: Writer):
        self.trained, self.table, self.tokenizer, self.writer = trained, table, tokenizer, writer


def open_model(config: GenerateConfig) -> OpenModel:
    """Load what writing takes; every rank calls it.

    Raises:
        UserError: flags, checkpoint and work dir do not fit together.
    """
    given, reading = config.generation, config.reading
    assert given.load and given.retro_work_dir
    work, trained, table, tokenizer = open_trained(given.load, given.retro_work_dir, config.parallel)
    reader, num_neighbors = None, 0
    if trained.retro and reading.retrieval != "off":
        num_neighbors = reading.retro_num_neighbors or trained.retro.retro_num_neighbors
        reader = open_reader(work, table, num_neighbors, reading.retrieval, seed=config.sampling.seed)
    return OpenModel(trained, table, tokenizer, make_writer(trained, table, tokenizer, reader, num_neighbors))


def open_trained(load: str, work_dir: str, parallel: ParallelConfig) -> tuple[WorkDir, Trained, ChunkTable, Tokenizer]:
    """Load a checkpoint and open the work dir that it is to read; every rank calls it.

    Raises:
        UserError: flags, checkpoint and work dir do not fit together.
    """
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if distributed.world_size() != ranks:
        raise UserError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} × --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} is one model on {ranks} ranks, but there are "
            f"{distributed.world_size()}; start torchrun with {ranks}"
        )
    distributed.use_this_ranks_share()
    mcore.initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    watch.at("the generation")
    work = distributed.together(lambda: open_work_dir(work_dir))
    work.verify(STAGES)
    trained = load_trained(load, parallel)
    table, tokenizer = distributed.together(lambda: (ChunkTable.open(work), open_tokenizer(work)))
    check_same_tokenizer(trained, work.manifest["stages"]["tokenizer"]["digest"], table.chunk_length, work_dir)
    return work, trained, table, tokenizer


def make_writer(
    trained: Trained, table: ChunkTable, tokenizer: Tokenizer, reader: Reader | None, num_neighbors: int
) -> Writer:
    """The writer of a model; K is 0 where no text ever reads."""
    context = trained.model.max_position_embeddings or trained.model.seq_length
    return Writer(
        mcore.unwrap(trained.module),
        chunk_length=table.chunk_length,
        context=context // table.chunk_length * table.chunk_length,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        pad=tokenizer.pad,
        reader=reader,
        num_neighbors=num_neighbors,
    )


class Text:
    """A text that grows."""

    def __init__(self, prompt: str, model: OpenModel):
        self._prompt, self._model = prompt, model
        self._tokens: list[int] = []
        self._finish: str | None = None
        self._read: list[dict[str, Any]] = []
        self._start = model.tokenizer.encode([prompt])[0]

    def add(self, event: Event) -> None:
        if event.token is not None:
            self._tokens.append(event.token)
        self._finish = event.finish or self._finish
        if event.chunk is not None:
            assert event.ids is not None and event.distances is not None
            length = self._model.table.chunk_length
            tokens = (self._start + self._tokens)[event.chunk * length : (event.chunk + 1) * length]
            neighbors = describe_neighbors(self._model.table, self._model.tokenizer, event.ids, event.distances)
            text = self._model.tokenizer.decode([tokens])[0]
            self._read.append({"chunk": event.chunk, "text": text, "neighbors": neighbors})

    @property
    def written(self) -> str:
        """What was added to the prompt."""
        before, whole = self._model.tokenizer.decode([self._start, self._start + self._tokens])
        return whole[len(before) :]

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt": self._prompt,
            "text": self.written,
            "tokens": len(self._tokens),
            "finish": self._finish,
            "read": self._read,
        }

    def as_text(self, show_neighbors: bool) -> str:
        color = sys.stdout.isatty()
        bold, dim, plain = (BOLD, DIM, PLAIN) if color else ("", "", "")
        lines = [f"{bold}{printable(self._prompt, _KEPT)}{plain}{printable(self.written, _KEPT)}"]
        columns = width()
        for read in self._read if show_neighbors else ():
            lines.append(f"{dim}chunk {read['chunk']}: {_one_line(read['text'], columns - 12)}{plain}")
            for neighbor in read["neighbors"]:
                distance = neighbor["distance"]
                near = "random" if distance is None else f"distance {distance:.3f}"
                head = f"  {neighbor['rank']}. {neighbor['document']}, {near}: "
                said = neighbor["text"] + neighbor["continuation"]
                lines.append(f"{dim}{head}{_one_line(said, max(20, columns - len(head)))}{plain}")
        return "\n".join(lines)


def _one_line(text: str, width: int) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
