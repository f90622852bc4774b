"""Tiny random models of other projects, whose every weight matters."""

import pathlib

import torch
import transformers

V, S = 97, 32  # S is a sample of tests/parallel_worker.py
_SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
_SHAPE |= dict(max_position_embeddings=64)
_GROUPED = dict(**_SHAPE, num_key_value_heads=2)
_STRETCHED = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
_STRETCHED |= dict(original_max_position_embeddings=8192, rope_theta=50000.0)
_GPT2 = dict(vocab_size=V, n_embd=32, n_layer=4, n_head=4, n_positions=64)
_GPT2 |= dict(bos_token_id=0, eos_token_id=0)

# name -> (class of transformers, its config)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", _GROUPED),
    "llama3": ("Llama", {**_GROUPED, "rope_parameters": _STRETCHED, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {**_SHAPE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_GROUPED, "head_dim": 12, "sliding_window": 48}),
    "qwen2": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 12}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-exact": ("GPT2", {**_GPT2, "activation_function": "gelu", "n_inner": 40, "tie_word_embeddings": False}),
    "pythia": ("GPTNeoX", {**_SHAPE, "rotary_pct": 0.25}),
    "neox-serial": ("GPTNeoX", {**_SHAPE, "rotary_pct": 1.0, "use_parallel_residual": False}),
}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def make(name: str) -> transformers.PreTrainedModel:
    """A model with random biases and norms too; tied weights stay tied."""
    kind, shape = MODELS[name]
    model = getattr(transformers, _HEADS.get(kind, f"{kind}ForCausalLM"))(
        getattr(transformers, f"{kind}Config")(**shape)
    )
    generator = torch.Generator().manual_seed(3)
    for parameter_name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = weight.dim() == 1 and parameter_name.endswith("weight")
        weight.data = 1 + 0.2 * noise if is_norm else 0.2 * noise
    return model.eval()


def tokens(num_samples: int = 2) -> torch.Tensor:
    """[num_samples, S]."""
    return torch.randint(V, (num_samples, S), generator=torch.Generator().manual_seed(5))


def save(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Its directory, with what it computes of `tokens()` beside it."""
    model, path = make(name), folder / name
    model.save_pretrained(path)
    with torch.no_grad():
        torch.save(model(tokens()).logits, folder / f"{name}.logits")
    return path
