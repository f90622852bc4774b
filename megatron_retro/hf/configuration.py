"""RetroConfig: the flags that shape a model, as `transformers` keeps them."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from megatron_retro.config import flags
from megatron_retro.config import model as shapes
from megatron_retro.interop.own import RETRO_TYPE

_OF_TRAINING = {"retro_work_dir", "retro_retrieval_dropout", "retro_random_neighbor_prob", "retro_max_overlap"}
_OF_TRAINING |= {"make_vocab_size_divisible_by", "retro_freeze_decoder"}


@dataclasses.dataclass
class _Shape:
    model: shapes.ModelConfig
    retro: shapes.RetroConfig


class RetroConfig(PreTrainedConfig):
    """A model's shape, under the names of the flags of `pretrain_retro.py` (`--hidden-size` is `hidden_size`).

    Args:
        vocab_size: of the tokenizer.
        retro_chunk_length: C.
        tokenizer_digest: of the tokenizer that the model was trained with, as its work dir records it.
        use_cache: whether `forward` keeps what it computes unless told otherwise.
        given: fields of `ModelConfig` and `RetroConfig` of `megatron_retro/config/model.py`, with their defaults but
            for `retro_add_retriever`, which is true; and what every `PreTrainedConfig` takes.

    Raises:
        UserError: the flags do not fit each other.
    """

    model_type = RETRO_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        retro_chunk_length: int = 64,
        tokenizer_digest: str | None = None,
        use_cache: bool = True,
        **given: Any,
    ):
        given = {self.attribute_map.get(name, name): value for name, value in given.items()}
        shape = {name: given.pop(name) for name in flag_names() if name in given}
        model, retro = _finished({"retro_add_retriever": True, **shape})
        for group in (model, retro):
            for name in flag_names() & {field.name for field in dataclasses.fields(group)}:
                setattr(self, name, getattr(group, name))
        self.vocab_size, self.retro_chunk_length = vocab_size, retro_chunk_length
        self.tokenizer_digest, self.use_cache = tokenizer_digest, use_cache
        given["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
        super().__init__(**given)

    def shape(self) -> tuple[shapes.ModelConfig, shapes.RetroConfig | None]:
        """The finished flags; None for a GPT."""
        model, retro = _finished({name: getattr(self, name) for name in flag_names()})
        return model, retro if retro.retro_add_retriever else None


def flag_names() -> set[str]:
    """The flags that shape a model."""
    groups = (shapes.ModelConfig, shapes.RetroConfig)
    return {field.name for group in groups for field in dataclasses.fields(group)} - _OF_TRAINING


def _finished(values: dict[str, Any]) -> tuple[shapes.ModelConfig, shapes.RetroConfig]:
    shape = flags.from_dict(_Shape, values)
    shape.model.finish()
    shape.retro.finish(shape.model)
    return shape.model, shape.retro
