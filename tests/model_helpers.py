"""Tiny models for tests, and RETRO once more as plain loops over one sample: what the real one must equal.

Letters as in design.md; sizes are distinct primes (or twice one), so that a mixed-up axis cannot go unnoticed.
"""

import math

import torch
from torch import Tensor

from megatron_retro import mcore
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.model.attention import ChunkedCrossAttention, EncoderCrossAttention
from megatron_retro.model.encoder import RetroEncoder
from megatron_retro.model.layer import Layer, Norm
from megatron_retro.model.model import RetroModel

B, K, C, L, V = 2, 3, 5, 7, 31
S, R = L * C, 2 * C
ROTARY_BASE = 100
SHAPE = dict(num_layers=4, hidden_size=26, ffn_hidden_size=46, num_attention_heads=4, kv_channels=6, seq_length=S + C)
RETRO_SHAPE = dict(
    retro_layers="2,4",
    retro_num_neighbors=K,
    retro_encoder_hidden_size=22,
    retro_encoder_ffn_hidden_size=38,
    retro_encoder_num_attention_heads=3,
)
AS_MEGATRON_LM = dict(
    retro_as_megatron_lm="core-unnormed",
    retro_encoder_hidden_size=SHAPE["hidden_size"],
    retro_encoder_ffn_hidden_size=SHAPE["ffn_hidden_size"],
    retro_encoder_num_attention_heads=SHAPE["num_attention_heads"],
    position_embedding_type="learned_absolute",
)


def initialize() -> None:
    """Make this process a world of one rank, once a session."""
    torch.set_num_threads(1)  # threads cost tiny tensors more than they give, most of all on a busy machine
    if not mcore.parallel_state.model_parallel_is_initialized():
        mcore.initialize()


def make_configs(*, retro: bool = True, **flags: object) -> tuple[ModelConfig, RetroConfig | None]:
    """Finished shapes; `flags` are fields of `ModelConfig` and `RetroConfig` that differ from those above."""
    of_retro = {name: value for name, value in flags.items() if name.startswith("retro_")}
    of_model = {name: value for name, value in flags.items() if name not in of_retro}
    model = ModelConfig(**{**SHAPE, "rotary_base": ROTARY_BASE, **of_model})
    model.finish()
    neighbors = None
    if retro:
        neighbors = RetroConfig(retro_add_retriever=True, **{**RETRO_SHAPE, **of_retro})
        neighbors.finish(model)
    return model, neighbors


def make_model(
    *,
    retro: bool = True,
    seed: int = 1,
    bf16: bool = False,
    silent: bool = False,
    recompute_granularity: str | None = None,
    **flags: object,
) -> RetroModel:
    """A model of `make_configs` with its initial weights; unless `silent`, with what it reads heard from the start."""
    initialize()
    model, neighbors = make_configs(retro=retro, **flags)
    parallel = TrainingParallelConfig(bf16=bf16, recompute_granularity=recompute_granularity)
    parallel.finish(1, model, neighbors)
    made = RetroModel(model, neighbors, parallel, vocab_size=V, chunk_length=C, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in () if silent else made.modules():
        if isinstance(module, ChunkedCrossAttention):
            weight = module.linear_proj.weight.data
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    return made


def in_double(module: torch.nn.Module, seed: int = 11) -> torch.nn.Module:
    """The module in float64, rotary positions too, with weights large enough that each of them matters."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        scale = weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.5
        center = 1.0 if "norm.weight" in name else 0.0
        weight.data = center + scale * noise
    for rotary in module.modules():
        if isinstance(rotary, mcore.RotaryEmbedding):
            rotary.inv_freq = frequencies(2 * len(rotary.inv_freq))
    return module


def make_tokens(num_positions: int = S, seed: int = 3) -> Tensor:
    """[B, num_positions]; a shorter sequence is a prefix of a longer one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, 4 * S), generator=generator)[:, :num_positions].contiguous()


def make_neighbors(seed: int = 5) -> tuple[Tensor, Tensor]:
    """Token ids [B, L, K, R] and lengths [B, L, K], from none to all R tokens; one chunk has no neighbor at all."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BxLxKxR = torch.randint(V, (B, L, K, R), generator=generator)
    lengths_BxLxK = torch.randint(1, R + 1, (B, L, K), generator=generator)
    lengths_BxLxK[0, 1, 2] = lengths_BxLxK[1, 3, :2] = 0
    lengths_BxLxK[0, 2] = 0
    lengths_BxLxK[1, 0] = R
    return tokens_BxLxKxR, lengths_BxLxK


def randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------- RETRO, in plain loops


@torch.no_grad()
def naive_logits(model: RetroModel, tokens_S: Tensor, tokens_LxKxR: Tensor, lengths_LxK: Tensor) -> Tensor:
    """Logits [S, V] of one sample."""
    num_chunks, num_neighbors, _ = tokens_LxKxR.shape
    x_SxD = model.embedding.word_embeddings.weight[tokens_S]
    if hasattr(model.embedding, "position_embeddings"):
        x_SxD = x_SxD + model.embedding.position_embeddings.weight[: len(tokens_S)]
    causal_SxS = torch.ones(len(tokens_S), len(tokens_S)).tril().bool()
    encoded = None
    for layer in model.decoder.layers:
        x_SxD = x_SxD + naive_self_attention(layer, x_SxD, causal_SxS, rotary=model.decoder.rotary)
        if layer.cross_attention is not None:
            reading_SxD = naive_norm(layer.pre_cross_attn_layernorm, x_SxD)
            if encoded is None:
                encoded = [
                    [
                        naive_encoder(
                            model.decoder.encoder,
                            tokens_LxKxR[u, k],
                            int(lengths_LxK[u, k]),
                            reading_SxD[u * C : (u + 1) * C],
                        )
                        for k in range(num_neighbors)
                    ]
                    for u in range(num_chunks)
                ]
            x_SxD = x_SxD + naive_cca(layer.cross_attention, reading_SxD, encoded, lengths_LxK)
        x_SxD = x_SxD + naive_mlp(layer, x_SxD)
    x_SxD = naive_norm(model.decoder.final_layernorm, x_SxD)
    tied = model.share_embeddings_and_output_weights
    return x_SxD @ (model.embedding.word_embeddings.weight if tied else model.output_layer.weight).T


@torch.no_grad()
def naive_encoder(encoder: RetroEncoder, tokens_R: Tensor, length: int, chunk_CxD: Tensor) -> Tensor | None:
    """One neighbor with its first `length` tokens [length, encoder width]; None where there is no neighbor."""
    if not length:
        return None
    x = encoder.embedding.word_embeddings.weight[tokens_R[:length]]
    everywhere = torch.ones(length, length).bool()
    for layer in encoder.layers:
        x = x + naive_self_attention(layer, x, everywhere, rotary=True)
        if layer.cross_attention is not None:
            x = x + naive_encoder_cross(layer.cross_attention, naive_norm(layer.pre_cross_attn_layernorm, x), chunk_CxD)
        x = x + naive_mlp(layer, x)
    return naive_norm(encoder.final_layernorm, x)


@torch.no_grad()
def naive_cca(cca: ChunkedCrossAttention, x_SxD: Tensor, encoded: list, lengths_LxK: Tensor) -> Tensor:
    """CCA of one sample [S, D]. `encoded[u][k]` is neighbor k of chunk u, [its length, encoder width] or None."""
    out = torch.zeros(len(x_SxD), x_SxD.shape[1], dtype=x_SxD.dtype)
    for position in range(C - 1, len(x_SxD)):
        chunk, offset = divmod(position - (C - 1), C)
        found = encoded[chunk] if chunk < len(encoded) else []
        rows = [
            (j, neighbor[j])
            for neighbor, length in zip(found, lengths_LxK[min(chunk, len(encoded) - 1)].tolist(), strict=False)
            for j in range(length)
        ]
        if not rows:
            continue
        q_HxE = naive_linear(cca.linear_q, x_SxD[position]).view(cca.num_heads, -1)
        kv_TxGx2E = naive_linear(cca.linear_kv, torch.stack([row for _, row in rows])).view(
            len(rows), cca.num_groups, -1
        )
        k_TxGxE, v_TxGxE = kv_TxGx2E.chunk(2, dim=-1)
        q_1xHxE = naive_rotary(q_HxE[None], [C - 1 + offset])
        k_TxGxE = naive_rotary(k_TxGxE, [j for j, _ in rows])
        seen = torch.ones(1, len(rows)).bool()
        out[position] = naive_linear(cca.linear_proj, naive_attention(q_1xHxE, k_TxGxE, v_TxGxE, seen))[0]
    return out


@torch.no_grad()
def naive_encoder_cross(cross: EncoderCrossAttention, x_RxD: Tensor, chunk_CxD: Tensor) -> Tensor:
    q_RxHxE = naive_linear(cross.linear_q, x_RxD).view(len(x_RxD), cross.num_heads, -1)
    kv_CxGx2E = naive_linear(cross.linear_kv, chunk_CxD).view(len(chunk_CxD), cross.num_groups, -1)
    k_CxGxE, v_CxGxE = kv_CxGx2E.chunk(2, dim=-1)
    q_RxHxE, k_CxGxE = naive_rotary(q_RxHxE, range(len(x_RxD))), naive_rotary(k_CxGxE, range(len(chunk_CxD)))
    out = naive_attention(q_RxHxE, k_CxGxE, v_CxGxE, torch.ones(len(x_RxD), len(chunk_CxD)).bool())
    return naive_linear(cross.linear_proj, out)


def naive_self_attention(layer: Layer, x_SxD: Tensor, seen_SxS: Tensor, *, rotary: bool) -> Tensor:
    config, module = layer.config, layer.self_attention
    head, per_group = config.kv_channels, config.num_attention_heads // config.num_query_groups
    qkv = naive_linear(module.linear_qkv, naive_norm(layer.input_layernorm, x_SxD))
    qkv = qkv.view(len(x_SxD), config.num_query_groups, -1)  # Megatron's order: a group's queries, its key, its value
    q, k, v = qkv.split([per_group * head, head, head], dim=-1)
    q = q.reshape(len(x_SxD), config.num_attention_heads, head)
    if rotary:
        q, k = naive_rotary(q, range(len(q))), naive_rotary(k, range(len(k)))
    return naive_linear(module.linear_proj, naive_attention(q, k, v, seen_SxS))


@torch.no_grad()
def naive_attention(q_SxHxE: Tensor, k_TxGxE: Tensor, v_TxGxE: Tensor, seen_SxT: Tensor) -> Tensor:
    """Attention query by query and head by head, over the keys seen; [S, H·E]."""
    num_heads, per_group = q_SxHxE.shape[1], q_SxHxE.shape[1] // k_TxGxE.shape[1]
    out = []
    for s in range(len(q_SxHxE)):
        for h in range(num_heads):
            k_TxE, v_TxE = k_TxGxE[seen_SxT[s], h // per_group], v_TxGxE[seen_SxT[s], h // per_group]
            weights_T = torch.exp(k_TxE @ q_SxHxE[s, h] / math.sqrt(q_SxHxE.shape[2]))
            out.append((weights_T / weights_T.sum()) @ v_TxE)
    return torch.stack(out).view(len(q_SxHxE), -1)


def naive_rotary(x_TxHxE: Tensor, positions) -> Tensor:
    """Turns each pair (x[m], x[m + E/2]) by position × base^(-2m/E)."""
    half = x_TxHxE.shape[-1] // 2
    angle_Tx1xM = torch.tensor(list(positions), dtype=torch.float64)[:, None, None] * frequencies(2 * half)
    first, second = x_TxHxE[..., :half], x_TxHxE[..., half:]
    cos, sin = angle_Tx1xM.cos(), angle_Tx1xM.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def frequencies(head_size: int) -> Tensor:
    exponents = [-2 * m / head_size for m in range(head_size // 2)]
    return torch.tensor([ROTARY_BASE**exponent for exponent in exponents], dtype=torch.float64)


def naive_mlp(layer: Layer, x_SxD: Tensor) -> Tensor:
    inside = naive_linear(layer.mlp.linear_fc1, naive_norm(layer.pre_mlp_layernorm, x_SxD))
    if layer.config.gated_linear_unit:
        gate, value = inside.chunk(2, dim=-1)
        inside = gate * torch.sigmoid(gate) * value
    else:
        inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
    return naive_linear(layer.mlp.linear_fc2, inside)


def naive_norm(norm: Norm, x: Tensor) -> Tensor:
    if norm.bias is None:
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight + norm.bias


def naive_linear(linear: torch.nn.Module, x: Tensor) -> Tensor:
    out = x @ linear.weight.T
    return out if linear.bias is None else out + linear.bias
