"""The arguments that Megatron-LM stores in a checkpoint, as our flags that give the same model."""

import pathlib
import re
from typing import Any

from megatron_retro.errors import UserError

# Arguments whose other values make a model that none of our flags gives.
_ONLY: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("apply_residual_connection_post_layernorm", "rotary_interleaved", "multi_latent_attention", "quick_geglu"),
    (False,),
)
_ONLY |= dict(num_experts=(None, 0), rotary_seq_len_interpolation_factor=(None, 1))


class Args:
    """Values by name; what does not fit is refused with the file's name.

    Args:
        file: that holds them.
    """

    def __init__(self, file: pathlib.Path, values: dict[str, Any]):
        self.file, self._values = file, values

    def get(self, *names: str, otherwise: Any = None) -> Any:
        """The first of several names that there is and that is not None."""
        given = (self._values[name] for name in names if self._values.get(name) is not None)
        return next(given, otherwise)

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise UserError(f"{self.file}: its args have no {names[0]}; it is no checkpoint of a GPT or RETRO")
        return value

    def whole(self, *names: str, otherwise: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.need(*names) if otherwise is None else self.get(*names, otherwise=otherwise)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.file}: its args have {names[0]} {value!r}; it is a number of at least 1")
        return value

    def number(self, *names: str, otherwise: float) -> float:
        value = self.get(*names, otherwise=otherwise)
        if not isinstance(value, (int, float)):
            raise UserError(f"{self.file}: its args have {names[0]} {value!r}; it is a number")
        return float(value)


def flags_of(args: Args, names: set[str], *, is_legacy: bool) -> dict[str, Any]:
    """Our flags.

    Args:
        names: ours, of the weights.
        is_legacy: whether it is from before megatron-core.

    Raises:
        UserError: there are none that give this model.
    """
    for name, values in _ONLY.items():
        if (value := args.get(name, otherwise=values[0])) not in values:
            raise UserError(f"{args.file}: its args have {name} {value!r}, which no model here has")
    heads, width = args.whole("num_attention_heads"), args.whole("hidden_size")
    groups = args.whole("num_query_groups", otherwise=heads) if args.get("group_query_attention") else heads
    biases, swiglu = bool(args.get("add_bias_linear", otherwise=True)), bool(args.get("swiglu"))
    squared_relu = bool(args.get("squared_relu"))
    by_tanh = (args.get("bias_gelu_fusion", otherwise=True) and biases) or args.get("openai_gelu")
    flags = dict(
        num_layers=args.whole("num_layers", "encoder_num_layers"),
        hidden_size=width,
        ffn_hidden_size=args.whole("ffn_hidden_size", otherwise=4 * width),
        num_attention_heads=heads,
        kv_channels=args.whole("kv_channels", otherwise=max(1, width // heads)),
        group_query_attention=groups != heads,
        num_query_groups=groups,
        max_position_embeddings=args.whole("max_position_embeddings"),
        position_embedding_type=_positions(args),
        rotary_base=args.whole("rotary_base", otherwise=10000),
        rotary_percent=args.number("rotary_percent", otherwise=1.0),
        use_rope_scaling=bool(args.get("use_rope_scaling")),
        rope_scaling_factor=args.number("rope_scaling_factor", otherwise=8.0),
        normalization=_normalization(args),
        norm_epsilon=args.number("norm_epsilon", "layernorm_epsilon", otherwise=1e-5),
        swiglu=swiglu,
        squared_relu=squared_relu and not swiglu,
        openai_gelu=bool(by_tanh) and not swiglu and not squared_relu,
        disable_bias_linear=not biases,
        add_qkv_bias=bool(args.get("add_qkv_bias")) and not biases,
        qk_layernorm=bool(args.get("qk_layernorm")),
        use_parallel_residual=False,
        untie_embeddings_and_output_weights=bool(args.get("untie_embeddings_and_output_weights")),
        make_vocab_size_divisible_by=args.whole("make_vocab_size_divisible_by", otherwise=128),
        retro_add_retriever=bool(args.get("retro_add_retriever")),
    )
    return {**flags, **_retro_flags(args, flags, names, is_legacy)} if flags["retro_add_retriever"] else flags


def _retro_flags(args: Args, flags: dict[str, Any], names: set[str], is_legacy: bool) -> dict[str, Any]:
    layers = {match[1] for name in names if (match := re.match(r"decoder\.layers\.(\d+)\.cross_attention\.", name))}
    if not layers:
        raise UserError(f"{args.file}: its args say RETRO, but it has no cross-attention; it is a GPT's")
    if args.whole("retro_num_retrieved_chunks", otherwise=2) != 2:
        number = args.whole("retro_num_retrieved_chunks")
        raise UserError(
            f"{args.file}: its neighbors are of {number} chunks; here they are of 2, chunk and continuation"
        )
    form = "legacy" if is_legacy else "core" if "decoder.final_layernorm.weight" in names else "core-unnormed"
    return dict(
        retro_num_neighbors=args.whole("retro_num_neighbors", otherwise=2),
        retro_layers=",".join(str(number + 1) for number in sorted(map(int, layers))),
        retro_encoder_layers=args.whole("retro_encoder_layers", otherwise=2),
        retro_encoder_hidden_size=flags["hidden_size"],
        retro_encoder_ffn_hidden_size=flags["ffn_hidden_size"],
        retro_encoder_num_attention_heads=flags["num_attention_heads"],
        retro_as_megatron_lm=form,
    )


def _positions(args: Args) -> str:
    positions = args.get("position_embedding_type", otherwise="learned_absolute")
    if args.get("use_rotary_position_embeddings"):
        return "rope"
    if positions not in ("rope", "learned_absolute"):
        raise UserError(f"{args.file}: its args have position_embedding_type {positions!r}, which no model here has")
    return str(positions)


def _normalization(args: Args) -> str:
    kind = args.get("normalization", otherwise="LayerNorm")
    if kind not in ("LayerNorm", "RMSNorm"):
        raise UserError(f"{args.file}: its args have normalization {kind!r}, which no model here has")
    return str(kind)
