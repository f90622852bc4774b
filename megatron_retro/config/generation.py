"""Flags of `tools/generate_retro_text.py`."""

import dataclasses
import pathlib

from megatron_retro.config.flags import at_least, flag, required
from megatron_retro.config.model import RETRIEVAL_MODES, ParallelConfig
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text


@dataclasses.dataclass
class GenerationGroup:
    """what to write on from"""

    load: str | None = flag(None, "directory of checkpoints, the newest is taken (required)")
    retro_work_dir: str | None = flag(None, "work dir with the tokenizer and the database to read (required)")
    prompt: str | None = flag(None, "the text to go on from")
    prompt_file: str | None = flag(None, 'prompts: one a line, or JSON lines with "prompt" where it ends in .jsonl')
    output: str | None = flag(None, "file for the JSON lines of --json", show="printed")


@dataclasses.dataclass
class SamplingGroup:
    """how to choose the next token"""

    max_new_tokens: int = flag(128, "tokens to write at the most; the end of the document ends a text before")
    temperature: float = flag(0.8, "of the distribution; 0 takes the likeliest token")
    top_k: int = flag(0, "choose among this many of the likeliest tokens; 0 is all")
    top_p: float = flag(0.95, "choose among the likeliest tokens that have this probability together")
    seed: int = flag(1234, "seed of the choices")
    num_samples: int = flag(1, "texts for each prompt")


@dataclasses.dataclass
class ReadingGroup:
    """what the model reads while it writes"""

    retrieval: str = flag("on", "the nearest chunks, none, or random ones", choices=RETRIEVAL_MODES)
    retro_num_neighbors: int | None = flag(None, "neighbors a chunk", show="the checkpoint's")
    show_neighbors: bool = flag(False, "print what was read")
    json: bool = flag(False, "print JSON lines")


@dataclasses.dataclass
class GenerateConfig:
    """Everything `tools/generate_retro_text.py` takes."""

    generation: GenerationGroup = dataclasses.field(default_factory=GenerationGroup)
    sampling: SamplingGroup = dataclasses.field(default_factory=SamplingGroup)
    reading: ReadingGroup = dataclasses.field(default_factory=ReadingGroup)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: names the flag, its value and what would do.
        """
        given, sampling = self.generation, self.sampling
        required(
            given,
            load="it takes the --save directory of a training run",
            retro_work_dir="it takes the work dir whose database the model reads",
        )
        if (given.prompt is None) == (given.prompt_file is None):
            raise UserError("give either --prompt or --prompt-file")
        if given.output and not self.reading.json:
            raise UserError("--output takes the JSON lines of --json, which is missing")
        at_least(1, sampling, "max_new_tokens", "num_samples")
        at_least(0, sampling, "top_k", "seed")
        if not 0 <= sampling.temperature < float("inf"):
            raise UserError(f"--temperature is {sampling.temperature}; it must be at least 0")
        if not 0 < sampling.top_p <= 1:
            raise UserError(f"--top-p is {sampling.top_p}; it lies above 0 and is at most 1")
        at_least(1, self.reading, "retro_num_neighbors")
        if self.parallel.sequence_parallel:
            raise UserError("--sequence-parallel shards long sequences in training; leave it out here")

    def prompts(self) -> list[str]:
        """The prompts.

        Raises:
            UserError: one is empty or no Unicode text, or the file cannot be read.
        """
        if self.generation.prompt is not None:
            prompts = {"--prompt": self.generation.prompt}
        else:
            prompts = _read_prompts(pathlib.Path(self.generation.prompt_file or ""))
        for where, prompt in prompts.items():
            if not prompt:
                raise UserError(f"{where} is empty; give at least a word to go on from")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{where} is no Unicode text ({error}); write it in UTF-8") from None
        return list(prompts.values())


def _read_prompts(path: pathlib.Path) -> dict[str, str]:
    """Where each prompt stands -> the prompt."""
    lines = read_text(f"--prompt-file {path}", path).split("\n")
    prompts = {f"--prompt-file {path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise UserError(f"--prompt-file {path} holds no prompt; write one a line")
    if path.suffix == ".jsonl":
        for where, line in prompts.items():
            try:
                prompts[where] = parse_json(line)["prompt"]
                if not isinstance(prompts[where], str):
                    raise TypeError("it is no string")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{where}: no "prompt" ({error}); write {{"prompt": "…"}} on each line') from None
    return prompts
