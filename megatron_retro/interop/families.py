"""Families of Hugging Face models as the plain GPT that each is: their config as our flags, their tensors as ours.

A family that fits is one whose layers are those of `model/layer.py` under some flags; nothing is approximated. Letters:
H heads, G key/value groups, E width of a head, D hidden size.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.errors import UserError
from megatron_retro.reading import parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One of our tensors, and those of the other model that hold the same numbers.

    Attributes:
        ours: name of a parameter of `RetroModel`.
        theirs: names.
        join: theirs -> ours, in the layout of one tensor-parallel rank.
        split: the inverse.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list["Tensor"]], "Tensor"] = lambda tensors: tensors[0]
    split: Callable[["Tensor"], list["Tensor"]] = lambda tensor: [tensor]


@dataclasses.dataclass(frozen=True)
class Family:
    """Models with the same names.

    Attributes:
        flags: of the content of `config.json`, our flags that give the same model.
        tensors: all weights of a model with these flags (finished).
        longest: positions up to which it is what the flags compute; None for any number.
        prefix: before most names; some files leave it out.
        no_weights: endings of names of tensors that are no weights, but buffers that old versions saved.
    """

    flags: Callable[["Config"], dict[str, Any]]
    tensors: Callable[[ModelConfig], Iterator[Mapped]]
    longest: Callable[["Config"], int | None]
    prefix: str
    no_weights: tuple[str, ...] = ()


class Config:
    """The content of a `config.json`; what does not fit is refused with the file's name.

    Args:
        path: of the directory.
        values: the content.
    """

    def __init__(self, path: pathlib.Path, values: dict[str, Any]):
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: pathlib.Path) -> "Config":
        """Of a directory."""
        try:
            values = parse_json(read_text(f"{path / 'config.json'}", path / "config.json"))
        except ValueError as error:
            raise UserError(f"{path / 'config.json'} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path / 'config.json'} holds no JSON object; it is no Hugging Face model's")
        return cls(path, values)

    def get(self, name: str, otherwise: Any = None) -> Any:
        """A value; `otherwise` where there is none, or it is null."""
        value = self.values.get(name)
        return otherwise if value is None else value

    def need(self, name: str) -> Any:
        """A value.

        Raises:
            UserError: there is none.
        """
        if (value := self.get(name)) is None:
            raise UserError(f"{self.path / 'config.json'} has no {name!r}; it is not a complete model's")
        return value

    def whole(self, name: str, otherwise: int | None = None) -> int:
        """A positive whole number."""
        value = self.need(name) if otherwise is None else self.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path / 'config.json'}: {name} is {value!r}; it must be a whole number above 0")
        return value

    def number(self, name: str, otherwise: float) -> float:
        """A finite number above 0."""
        value = self.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"{self.path / 'config.json'}: {name} is {value!r}; it must be a number above 0")
        return float(value)

    def inner(self, *names: str) -> "Config":
        """The objects that stand under these names, as one; of what several hold, the last one's."""
        values: dict[str, Any] = {}
        for name in names:
            value = self.get(name, {})
            if not isinstance(value, dict):
                raise UserError(f"{self.path / 'config.json'}: {name} is {value!r}; it must be a JSON object")
            values.update(value)
        return Config(self.path, values)

    def only(self, name: str, *allowed: Any, otherwise: Any) -> Any:
        """A value that must be one of `allowed`.

        Raises:
            UserError: it is another, which no flag here gives.
        """
        value = self.get(name, otherwise)
        if value not in allowed:
            fits = " or ".join(map(repr, allowed))
            raise UserError(f"{self.path / 'config.json'}: {name} is {value!r}; only {fits} can be computed here")
        return value


def family_of(config: Config) -> Family:
    """The family of a model.

    Raises:
        UserError: none of those here.
    """
    kind = config.need("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{config.path / 'config.json'}: model_type {kind!r} is none of {', '.join(sorted(FAMILIES))}; take a "
            "model of one of these"
        )
    return FAMILIES[kind]


# ------------------------------------------------------------------------------------------------ Llama and relatives


def _llama_flags(config: Config) -> dict[str, Any]:
    kind, heads, width = config.need("model_type"), config.whole("num_attention_heads"), config.whole("hidden_size")
    groups = config.whole("num_key_value_heads", heads)
    config.only("hidden_act", "silu", otherwise="silu")
    has_bias = bool(config.get("attention_bias", False))
    if has_bias != bool(config.get("mlp_bias", False)):
        raise UserError(
            f"{config.path / 'config.json'}: attention_bias is {has_bias} and mlp_bias is not; linear layers here have "
            "biases all, or queries, keys and values alone"
        )
    return {
        "num_layers": config.whole("num_hidden_layers"),
        "hidden_size": width,
        "ffn_hidden_size": config.whole("intermediate_size"),
        "num_attention_heads": heads,
        "kv_channels": config.whole("head_dim", width // heads),
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "max_position_embeddings": config.whole("max_position_embeddings"),
        "position_embedding_type": "rope",
        **_rotary_flags(config),
        "normalization": "RMSNorm",
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "swiglu": True,
        "openai_gelu": False,
        "disable_bias_linear": not has_bias,
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "use_parallel_residual": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def _window(config: Config) -> int | None:
    """Up to there a sliding window of self-attention makes no difference."""
    uses_window = config.get("use_sliding_window", config.get("model_type") == "mistral")
    has_window = uses_window and config.get("sliding_window") is not None
    return config.whole("sliding_window") if has_window else None


def _rotary_flags(config: Config, percent: float = 1.0) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; before it `rope_theta`, `rope_scaling` and names of their own."""
    rotary = config.inner("rope_scaling", "rope_parameters")
    base = rotary.number("rope_theta", config.number("rope_theta", config.number("rotary_emb_base", 10000)))
    percent = rotary.number("partial_rotary_factor", config.number("rotary_pct", percent))
    if base != int(base):
        raise UserError(f"{config.path / 'config.json'}: rope_theta is {base}; --rotary-base takes whole numbers")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    stretched = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    fits = kind == "default" or (kind == "llama3" and all(rotary.get(name) == at for name, at in stretched.items()))
    if not fits:
        raise UserError(
            f"{config.path / 'config.json'}: rotary positions are of the kind {rotary.values}; only 'default', and "
            f"'llama3' with {stretched}, can be computed here"
        )
    return {
        "rotary_base": int(base),
        "rotary_percent": percent,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": rotary.number("factor", 8.0) if kind == "llama3" else 8.0,
    }


def _llama_tensors(model: ModelConfig) -> Iterator[Mapped]:
    yield Mapped("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    qkv_bias = model.add_qkv_bias or not model.disable_bias_linear
    for number in range(model.num_layers):
        ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
        yield Mapped(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",))
        for kind in ("weight", "bias") if qkv_bias else ("weight",):
            names = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Mapped(f"{ours}.self_attention.linear_qkv.{kind}", names, *_by_group(model))
        if model.qk_layernorm:
            yield Mapped(f"{ours}.self_attention.q_layernorm.weight", (f"{theirs}.self_attn.q_norm.weight",))
            yield Mapped(f"{ours}.self_attention.k_layernorm.weight", (f"{theirs}.self_attn.k_norm.weight",))
        yield Mapped(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for kind in ("weight",) if model.disable_bias_linear else ("weight", "bias"):
            yield Mapped(f"{ours}.self_attention.linear_proj.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
            gate_and_up = (f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}")
            yield Mapped(f"{ours}.mlp.linear_fc1.{kind}", gate_and_up, _stack, _halves)
            yield Mapped(f"{ours}.mlp.linear_fc2.{kind}", (f"{theirs}.mlp.down_proj.{kind}",))
    yield Mapped("decoder.final_layernorm.weight", ("model.norm.weight",))
    if model.untie_embeddings_and_output_weights:
        yield Mapped("output_layer.weight", ("lm_head.weight",))


# ------------------------------------------------------------------------------------------------ GPT-2


def _gpt2_flags(config: Config) -> dict[str, Any]:
    width, heads = config.whole("n_embd"), config.whole("n_head")
    activation = config.only(
        "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", otherwise="gelu_new"
    )
    config.only("scale_attn_weights", True, otherwise=True)
    config.only("scale_attn_by_inverse_layer_idx", False, otherwise=False)
    config.only("add_cross_attention", False, otherwise=False)
    return {
        **_LAYER_NORM_GPT,
        "num_layers": config.whole("n_layer"),
        "hidden_size": width,
        "ffn_hidden_size": config.whole("n_inner", 4 * width),
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "num_query_groups": heads,
        "max_position_embeddings": config.whole("n_positions"),
        "position_embedding_type": "learned_absolute",
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "openai_gelu": activation != "gelu",
        "use_parallel_residual": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
    }


def _gpt2_tensors(model: ModelConfig) -> Iterator[Mapped]:
    yield Mapped("embedding.word_embeddings.weight", ("transformer.wte.weight",))
    yield Mapped("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    join, split = _by_group(model)
    thirds = Mapped("", (), lambda tensors: join(list(tensors[0].chunk(3))), lambda tensor: [_stack(split(tensor))])
    for number in range(model.num_layers):
        ours, theirs = f"decoder.layers.{number}", f"transformer.h.{number}"
        linears = {
            "self_attention.linear_qkv": ("attn.c_attn", thirds),
            "self_attention.linear_proj": ("attn.c_proj", Mapped("", ())),
            "mlp.linear_fc1": ("mlp.c_fc", Mapped("", ())),
            "mlp.linear_fc2": ("mlp.c_proj", Mapped("", ())),
        }
        for our_name, (name, change) in linears.items():
            yield Mapped(f"{ours}.{our_name}.weight", (f"{theirs}.{name}.weight",), *_transposed(change))
            yield Mapped(f"{ours}.{our_name}.bias", (f"{theirs}.{name}.bias",), change.join, change.split)
        for our_name, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            yield from _norm(f"{ours}.{our_name}", f"{theirs}.{name}")
    yield from _norm("decoder.final_layernorm", "transformer.ln_f")
    if model.untie_embeddings_and_output_weights:
        yield Mapped("output_layer.weight", ("lm_head.weight",))


# ------------------------------------------------------------------------------------------------ GPT-NeoX, Pythia


def _neox_flags(config: Config) -> dict[str, Any]:
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    activation = config.only("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", otherwise="gelu")
    config.only("attention_bias", True, otherwise=True)
    return {
        **_LAYER_NORM_GPT,
        "num_layers": config.whole("num_hidden_layers"),
        "hidden_size": width,
        "ffn_hidden_size": config.whole("intermediate_size"),
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "num_query_groups": heads,
        "max_position_embeddings": config.whole("max_position_embeddings"),
        "position_embedding_type": "rope",
        **_rotary_flags(config, percent=0.25),
        "norm_epsilon": config.number("layer_norm_eps", 1e-5),
        "openai_gelu": activation != "gelu",
        "use_parallel_residual": bool(config.get("use_parallel_residual", True)),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def _neox_tensors(model: ModelConfig) -> Iterator[Mapped]:
    yield Mapped("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",))
    names = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",  # each head's query, key and value side by side too
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    for number in range(model.num_layers):
        for ours, theirs in names.items():
            yield from _norm(f"decoder.layers.{number}.{ours}", f"gpt_neox.layers.{number}.{theirs}")
    yield from _norm("decoder.final_layernorm", "gpt_neox.final_layer_norm")
    if model.untie_embeddings_and_output_weights:
        yield Mapped("output_layer.weight", ("embed_out.weight",))


# ------------------------------------------------------------------------------------------------ parts

_LAYER_NORM_GPT = {
    "group_query_attention": False,
    "normalization": "LayerNorm",
    "swiglu": False,
    "disable_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}


def _norm(ours: str, theirs: str) -> Iterator[Mapped]:
    for kind in ("weight", "bias"):
        yield Mapped(f"{ours}.{kind}", (f"{theirs}.{kind}",))


def _by_group(model: ModelConfig) -> tuple[Callable[[list["Tensor"]], "Tensor"], Callable[["Tensor"], list["Tensor"]]]:
    """Queries [H·E, …], keys [G·E, …], values [G·E, …] <-> each group's queries, key and value side by side."""
    groups, width = model.num_query_groups or 0, model.kv_channels or 0
    sizes = [(model.num_attention_heads or 0) // groups * width, width, width]

    def join(parts: list["Tensor"]) -> "Tensor":
        import torch

        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(tensor: "Tensor") -> list["Tensor"]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(sizes, 1)]

    return join, split


def _transposed(change: Mapped) -> tuple[Callable[[list["Tensor"]], "Tensor"], Callable[["Tensor"], list["Tensor"]]]:
    """The same of matrices that stand the other way round."""
    return lambda tensors: change.join([tensors[0].t()]), lambda tensor: [change.split(tensor)[0].t()]


def _stack(tensors: list["Tensor"]) -> "Tensor":
    import torch

    return torch.cat(tensors)


def _halves(tensor: "Tensor") -> list["Tensor"]:
    return list(tensor.chunk(2))


_LLAMA = Family(_llama_flags, _llama_tensors, _window, "model.", (".rotary_emb.inv_freq",))
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family(
        _gpt2_flags,
        _gpt2_tensors,
        lambda config: config.whole("n_positions"),
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        _neox_flags,
        _neox_tensors,
        lambda config: None,
        "gpt_neox.",
        (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
}
