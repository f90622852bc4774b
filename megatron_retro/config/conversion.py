"""Flags of `tools/convert_checkpoint.py`."""

import dataclasses

from megatron_retro.config.flags import at_least, flag, required

DEFAULT_CHUNK_LENGTH = 64


@dataclasses.dataclass
class ConversionConfig:
    """from where to where"""

    load: str | None = flag(
        None, "what to convert: a Hugging Face directory, or a --save directory, whose newest checkpoint is taken"
    )
    save: str | None = flag(
        None, "where to: checkpoints of this project from a foreign model, a Hugging Face directory from one of its own"
    )
    tokenizer_model: str | None = flag(None, "the model's tokenizer", show="the one beside the weights")
    retro_chunk_length: int | None = flag(
        None, "tokens a chunk of the work dirs that a GPT will be evaluated on", show=str(DEFAULT_CHUNK_LENGTH)
    )
    trust_pickle: bool = flag(False, "read a checkpoint of Megatron-LM's .pt files")
    bf16: bool = flag(False, "store weights in bfloat16; without it fp32")


@dataclasses.dataclass
class ConvertConfig:
    """Everything `tools/convert_checkpoint.py` takes."""

    conversion: ConversionConfig = dataclasses.field(default_factory=ConversionConfig)

    def finish(self) -> None:
        """Check.

        Raises:
            UserError: names the flag and what is missing.
        """
        required(self.conversion, load="it takes the directory of a model", save="it takes a directory to make")
        at_least(1, self.conversion, "retro_chunk_length")
