"""A GPT trained here as one of the models that `transformers` has: which one, its configuration, its tensors."""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_retro.config.flags import flag_name
from megatron_retro.config.model import ModelConfig
from megatron_retro.errors import UserError
from megatron_retro.interop.families import FAMILIES, Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def kind_of(model: ModelConfig) -> str:
    """The `model_type` that comes nearest."""
    if model.position_embedding_type == "learned_absolute":
        return "gpt2"
    if model.normalization == "LayerNorm":
        return "gpt_neox"
    if model.qk_layernorm:
        return "qwen3"
    return "qwen2" if model.add_qkv_bias and model.disable_bias_linear else "llama"


def config_of(model: ModelConfig, **given: Any) -> "PreTrainedConfig":
    """Its configuration.

    Args:
        model: finished.
        given: what else a configuration takes (vocab_size, eos_token_id, …).

    Raises:
        UserError: no model of `transformers` computes what these flags say; names the flag.
    """
    import transformers

    kind = kind_of(model)
    given["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    make = {"gpt2": _gpt2, "gpt_neox": _neox}.get(kind, _llama)
    config = transformers.AutoConfig.for_model(kind, **make(model), **given)
    ours, theirs = _comparable(model), FAMILIES[kind].flags(Config(pathlib.Path("."), config.to_dict()))
    for name, value in theirs.items():
        if name in ours and ours[name] != value:
            raise UserError(
                f"{flag_name(name)} is {ours[name]}; transformers' {kind}, the nearest model to this GPT's flags, is "
                f"{flag_name(name)} {value}, so there is none to export it as"
            )
    return config


def tensors_of(model: ModelConfig, weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Our weights, by their names there."""
    mapped = {one.ours: one for one in FAMILIES[kind_of(model)].tensors(model)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights:
        one = mapped[name]
        tensors.update(
            (theirs, part.clone(memory_format=torch.contiguous_format))
            for theirs, part in zip(one.theirs, one.split(tensor), strict=True)
        )
    return tensors


def _comparable(model: ModelConfig) -> dict[str, Any]:
    """Flags as a family reads them from a configuration: different flags of one model become the same."""
    ours = dict(vars(model))
    ours["group_query_attention"] = model.num_query_groups != model.num_attention_heads
    ours["add_qkv_bias"] = model.add_qkv_bias and model.disable_bias_linear
    if not model.use_rope_scaling:
        del ours["rope_scaling_factor"]
    return ours


def _rotary_gpt(model: ModelConfig) -> dict[str, Any]:
    """What Llama, its relatives and GPT-NeoX call alike."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
    }


def _llama(model: ModelConfig) -> dict[str, Any]:
    biases = not model.disable_bias_linear
    return {
        **_rotary_gpt(model),
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rope_parameters": _rope(model),
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": biases,
        "mlp_bias": biases,
    }


def _neox(model: ModelConfig) -> dict[str, Any]:
    return {
        **_rotary_gpt(model),
        "rope_parameters": {**_rope(model), "partial_rotary_factor": model.rotary_percent},
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": "gelu_new" if model.openai_gelu else "gelu",
        "use_parallel_residual": model.use_parallel_residual,
        "hidden_dropout": model.hidden_dropout,
    }


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_method_std,
    }


def _rope(model: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return rope
