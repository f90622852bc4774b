"""Megatron-LM's RETRO once more, in plain torch over one sample, and its checkpoints with random weights.

Weights are those of one rank under megatron-core's names without fused norms; `save` shards and renames them as each
version of Megatron-LM would have.
"""

import argparse
import dataclasses
import enum
import io
import math
import pathlib
import random
import re

import torch
import torch.nn.functional as F
from torch import Tensor

B, K, C, L, V = 2, 3, 5, 4, 48  # samples, neighbors, chunk length, chunks, vocabulary
S, R, D, H, E, INNER = L * C, 2 * C, 26, 8, 8, 40
LAYERS, READING, ENCODER_LAYERS = 9, (5, 8), 2  # decoder layers, those that read (from 0), encoder layers
ENCODER = f"decoder.layers.{READING[0]}.cross_attention.encoder."


class ModelType(enum.Enum):
    """Of the kind that Megatron-LM's args hold, of a class that a reader of the file does not have."""

    retro_decoder = 4


@dataclasses.dataclass(frozen=True)
class Old:
    """A model of Megatron-LM.

    Attributes:
        naming: "fused" (Transformer Engine), "local", or "legacy" (before megatron-core).
        retro: whether it reads neighbors.
        like_43b: rotary positions on half of each head, norms stored as the distance from one, no biases, untied.
        activation: "gelu", "swiglu" or "squared_relu".
        final_norm: of the decoder.
        gate: factor of what chunked cross-attention adds.
    """

    naming: str
    retro: bool = True
    like_43b: bool = False
    activation: str = "gelu"
    final_norm: bool = True
    gate: float = 1.0

    def args(self, tensor: int, pipeline: int) -> argparse.Namespace:
        """As in a checkpoint; of its hundreds of values those that matter, and one of a foreign class."""
        values = dict(
            num_layers=LAYERS, hidden_size=D, num_attention_heads=H, kv_channels=E, ffn_hidden_size=INNER,
            group_query_attention=False, num_query_groups=1, seq_length=S, max_position_embeddings=S + 7,
            padded_vocab_size=V, make_vocab_size_divisible_by=6, norm_epsilon=1e-5, normalization="LayerNorm",
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
            model_type=ModelType.retro_decoder,
            add_bias_linear=not self.like_43b, bias_gelu_fusion=not self.like_43b, apply_layernorm_1p=self.like_43b,
            use_rotary_position_embeddings=self.like_43b, rotary_percent=0.5 if self.like_43b else 1.0,
            position_embedding_type="rope" if self.like_43b else "learned_absolute", params_dtype=torch.bfloat16,
            untie_embeddings_and_output_weights=self.like_43b, swiglu=self.activation == "swiglu",
            squared_relu=self.activation == "squared_relu", retro_add_retriever=self.retro, retro_num_neighbors=K,
            retro_encoder_layers=ENCODER_LAYERS, retro_num_retrieved_chunks=2, retro_chunk_length=C,
            retro_attention_gate=self.gate,
        )  # fmt: skip
        return argparse.Namespace(**values)

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if len(shape) == 2 else 0.4)
            + (1.0 if re.search(r"norm\.weight$", name) and not self.like_43b else 0.0)
            for name, shape in self._shapes().items()
        }
        if not self.final_norm:  # what it would bring to one size is larger here
            weights["output_layer.weight"] *= 0.2
        return weights

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (V, D)}
        if not self.like_43b:
            shapes["embedding.position_embeddings.weight"] = (S + 7, D)
        for number in range(LAYERS):
            shapes |= self._layer(f"decoder.layers.{number}.", reads=self.retro and number in READING)
        for number in range(ENCODER_LAYERS) if self.retro else ():
            shapes |= self._layer(f"{ENCODER}layers.{number}.", reads=number == 0)
        if self.final_norm:
            shapes |= self._norm("decoder.final_layernorm")
        return shapes | ({"output_layer.weight": (V, D)} if self.like_43b else {})

    def _layer(self, prefix: str, reads: bool) -> dict[str, tuple[int, ...]]:
        wide = 2 if self.activation == "swiglu" else 1
        shapes = self._norm(f"{prefix}input_layernorm") | self._norm(f"{prefix}pre_mlp_layernorm")
        shapes |= self._linear(f"{prefix}self_attention.linear_qkv", 3 * H * E, D)
        shapes |= self._linear(f"{prefix}self_attention.linear_proj", D, H * E)
        shapes |= self._linear(f"{prefix}mlp.linear_fc1", wide * INNER, D)
        shapes |= self._linear(f"{prefix}mlp.linear_fc2", D, INNER)
        if reads:
            shapes |= self._norm(f"{prefix}pre_cross_attn_layernorm")
            shapes |= self._linear(f"{prefix}cross_attention.attn.linear_q", H * E, D)
            shapes |= self._linear(f"{prefix}cross_attention.attn.linear_kv", 2 * H * E, D)
            shapes |= self._linear(f"{prefix}cross_attention.attn.linear_proj", D, H * E)
        return shapes

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (D,), f"{name}.bias": (D,)}

    def _linear(self, name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns)} | ({} if self.like_43b else {f"{name}.bias": (rows,)})


# ------------------------------------------------------------------------------------------- what it computed


class Computed:
    """The logits of an old model, in float64."""

    def __init__(self, old: Old, weights: dict[str, Tensor]):
        self.old, self.weights = old, {name: weight.double() for name, weight in weights.items()}

    def logits(self, tokens_S: Tensor, neighbors_LxKxR: Tensor | None) -> Tensor:
        """[S, V] of one sample; every token of every neighbor counts, padding or not."""
        x, encoded = self.embed(tokens_S), None
        causal = torch.ones(len(x), len(x)).tril().bool()
        for number in range(LAYERS):
            layer = f"decoder.layers.{number}."
            x = x + self.attend_self(layer, x, causal, rotary=self.old.like_43b)
            if number in READING and neighbors_LxKxR is not None:
                normed = self.norm(f"{layer}pre_cross_attn_layernorm", x)
                if encoded is None:
                    encoded = [
                        torch.cat([self.encode(tokens_R, normed[u * C : (u + 1) * C]) for tokens_R in neighbors_KxR])
                        for u, neighbors_KxR in enumerate(neighbors_LxKxR)
                    ]
                # The last token of chunk u, and all but the last of chunk u + 1, read what chunk u retrieved.
                read = [torch.zeros(C - 1, D).double()]
                for u, neighbors in enumerate(encoded):
                    queries = normed[(u + 1) * C - 1 : (u + 2) * C - 1]
                    read.append(self.attend_other(f"{layer}cross_attention.attn.", queries, neighbors))
                x = x + self.old.gate * torch.cat(read)
            x = x + self.mlp(layer, x)
        if self.old.final_norm:
            x = self.norm("decoder.final_layernorm", x)
        return x @ self.weights["output_layer.weight" if self.old.like_43b else "embedding.word_embeddings.weight"].T

    def encode(self, tokens_R: Tensor, chunk_CxD: Tensor) -> Tensor:
        x = self.embed(tokens_R)
        everywhere = torch.ones(R, R).bool()
        for number in range(ENCODER_LAYERS):
            layer = f"{ENCODER}layers.{number}."
            x = x + self.attend_self(layer, x, everywhere, rotary=False)
            if number == 0:
                normed = self.norm(f"{layer}pre_cross_attn_layernorm", x)
                read = self.attend_other(f"{layer}cross_attention.attn.", normed, chunk_CxD)
                x = (x if self.old.naming == "legacy" else normed) + read
            x = x + self.mlp(layer, x)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.weights["embedding.word_embeddings.weight"][tokens]
        return x if self.old.like_43b else x + self.weights["embedding.position_embeddings.weight"][: len(tokens)]

    def attend_self(self, layer: str, x: Tensor, seen: Tensor, *, rotary: bool) -> Tensor:
        qkv = self.linear(f"{layer}self_attention.linear_qkv", self.norm(f"{layer}input_layernorm", x))
        q, k, v = qkv.view(len(x), H, 3, E).unbind(2)  # of each head its query, key and value lie together
        if rotary:
            q, k = turned(q), turned(k)
        return self.linear(f"{layer}self_attention.linear_proj", attention(q, k, v, seen))

    def attend_other(self, prefix: str, x: Tensor, other: Tensor) -> Tensor:
        q = self.linear(f"{prefix}linear_q", x).view(len(x), H, E)
        k, v = self.linear(f"{prefix}linear_kv", other).view(len(other), H, 2, E).unbind(2)
        return self.linear(f"{prefix}linear_proj", attention(q, k, v, torch.ones(len(x), len(other)).bool()))

    def mlp(self, layer: str, x: Tensor) -> Tensor:
        inner = self.linear(f"{layer}mlp.linear_fc1", self.norm(f"{layer}pre_mlp_layernorm", x))
        if self.old.activation == "swiglu":
            inner = F.silu(inner[:, :INNER]) * inner[:, INNER:]
        elif self.old.activation == "squared_relu":
            inner = inner.clamp(min=0) ** 2
        elif self.old.like_43b:
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        else:  # fused with the bias, GELU was approximated
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return self.linear(f"{layer}mlp.linear_fc2", inner)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"] + (1 if self.old.like_43b else 0)
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + self.weights[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.einsum("she,the->hst", q, k) / math.sqrt(E)
    return torch.einsum("hst,the->she", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)


def turned(x: Tensor) -> Tensor:
    """The first half of each head rotated by position; the rest as it is."""
    first, second, rest = x[..., : E // 4], x[..., E // 4 : E // 2], x[..., E // 2 :]
    speed = 10000.0 ** (-torch.arange(E // 4).double() / (E // 4))
    angle = torch.arange(len(x)).double()[:, None, None] * speed
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest), -1)


# ------------------------------------------------------------------------------------------------- what it saved


def save(root: pathlib.Path, old: Old, weights: dict[str, Tensor], tensor: int = 1, pipeline: int = 1) -> pathlib.Path:
    """Write a checkpoint of these many tensor-parallel ranks and pipeline stages; the directory of its iteration."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1200")
    for rank in range(tensor):
        for stage in range(pipeline):
            place = root / "iter_0001200" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
            place.mkdir(parents=True)
            model = dict(of_stage(old, weights, rank, tensor, stage, pipeline))
            if old.naming == "fused":
                model["decoder.layers.0.self_attention.core_attention._extra_state"] = io.BytesIO(b"scales")
            content = dict(
                args=old.args(tensor, pipeline),
                checkpoint_version=3.0,
                iteration=1200,
                model=nested(model) if old.naming == "legacy" else model,
                optimizer={"state": {0: {"exp_avg": torch.randn(64)}}},
                rng_state=[{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}],
            )
            torch.save(content, place / "model_optim_rng.pt")
    return root / "iter_0001200"


def of_stage(old: Old, weights: dict[str, Tensor], rank: int, tensor: int, stage: int, pipeline: int):
    """(its name, with the stage's own layer number; part) of each weight of a rank."""
    before = LAYERS // pipeline * stage
    here = range(before, LAYERS if stage == pipeline - 1 else before + LAYERS // pipeline)
    for name, weight in weights.items():
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            if int(match[1]) in here:
                theirs = renamed(name, old).replace(f"layers.{match[1]}.", f"layers.{int(match[1]) - before}.", 1)
                yield theirs, part_of(old, name, weight, rank, tensor)
        elif stage == (0 if name.startswith("embedding") else pipeline - 1):
            yield renamed(name, old), part_of(old, name, weight, rank, tensor)
    if stage == pipeline - 1 and pipeline > 1 and not old.like_43b:
        copy = "word_embeddings_for_head.weight" if old.naming == "legacy" else "output_layer.weight"
        yield copy, weights["embedding.word_embeddings.weight"].chunk(tensor)[rank].clone()


def part_of(old: Old, name: str, weight: Tensor, rank: int, tensor: int) -> Tensor:
    """A tensor-parallel rank's own."""
    if "linear_fc1" in name and old.activation == "swiglu":
        gate, value = weight.chunk(2)
        return torch.cat((gate.chunk(tensor)[rank], value.chunk(tensor)[rank]))
    if any(part in name for part in ("word_embeddings", "output_layer", "linear_qkv", "linear_q.", "linear_kv", "fc1")):
        return weight.chunk(tensor)[rank].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return weight.chunk(tensor, 1)[rank].clone()
    return weight


def renamed(name: str, old: Old) -> str:
    """As a version of Megatron-LM called a weight."""
    in_reading_layer_of_encoder = re.search(r"encoder\.layers\.0\.", name)
    if old.naming != "legacy":
        if in_reading_layer_of_encoder:
            name = name.replace("pre_mlp_layernorm.", "pre_mlp_layernorm.norm.")
        elif old.naming == "fused":
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if old.naming == "fused":
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        return name
    number = re.findall(r"layers\.(\d+)", name)
    reads = bool(in_reading_layer_of_encoder) or (len(number) == 1 and old.retro and int(number[0]) in READING)
    name = name.replace("pre_mlp_layernorm", "post_inter_attention_layernorm" if reads else "post_attention_layernorm")
    name = name.replace("pre_cross_attn_layernorm", "post_attention_layernorm")
    for theirs, ours in {
        "self_attention.query_key_value": "self_attention.linear_qkv",
        "self_attention.dense": "self_attention.linear_proj",
        "inter_attention.query": "cross_attention.attn.linear_q",
        "inter_attention.key_value": "cross_attention.attn.linear_kv",
        "inter_attention.dense": "cross_attention.attn.linear_proj",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
        "retriever.": "cross_attention.encoder.",
    }.items():
        name = name.replace(ours + ("" if ours.endswith(".") else "."), theirs + ("" if theirs.endswith(".") else "."))
    return "language_model." + re.sub(r"^decoder\.", "encoder.", name)


def nested(model: dict[str, Tensor]) -> dict:
    """The dictionaries in dictionaries that the model saved before megatron-core."""
    saved: dict = {}
    for name, tensor in model.items():
        depth = 2 if ".encoder." in name else name.count(".")
        *outer, last = name.split(".", depth)
        inner = saved
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return saved


def tokens_and_neighbors(seed: int = 3) -> tuple[Tensor, Tensor]:
    """[B, S] and [B, L, K, R]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, S), generator=generator), torch.randint(V, (B, L, K, R), generator=generator)
