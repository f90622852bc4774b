"""The yardstick of `train_step.py`: RETRO in plain PyTorch, one process, no framework.

The same computation as `megatron_retro.model`, written for one device: axes [samples, positions, width], `nn.Linear`,
SDPA, `F.cross_entropy`, fused AdamW. Weights are laid out as the product's, so they can be copied over. bf16 is done as
the product's --bf16 does it: bf16 weights, activations and gradients, fp32 main weights in the optimizer.

Letters: N sequences, T their positions, B samples, S positions, C chunk length, L chunks, K neighbors, R retrieved
tokens, H heads, E width of a head, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.training import OptimizationConfig


def angles_of(length: int, head_size: int, base: int) -> Tensor:
    """Cosines and sines of rotary positions 0 … length-1, [2, length, E]."""
    frequency = base ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_NxHxTxE: Tensor, angles_2xTxE: Tensor) -> Tensor:
    cosine, sine = angles_2xTxE
    first, second = x_NxHxTxE.chunk(2, -1)
    return x_NxHxTxE * cosine + torch.cat((-second, first), -1) * sine


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_size: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_size, bias=bias)
        self.out = nn.Linear(heads * head_size, width, bias=bias)

    def forward(self, x_NxTxD: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        """Causal without a mask; mask: bool [N, 1, 1, T], True where all may look."""
        q, k, v = self.qkv(x_NxTxD).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        q, k = rotate(q, angles), rotate(k, angles)
        out_NxHxTxE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(out_NxHxTxE.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, read_width: int, heads: int, head_size: int, chunk: int, bias: bool):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.q = nn.Linear(width, heads * head_size, bias=bias)
        self.kv = nn.Linear(read_width, 2 * heads * head_size, bias=bias)
        self.out = nn.Linear(heads * head_size, width, bias=bias)

    def split(self, x_NxTxHE: Tensor) -> Tensor:
        return x_NxTxHE.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DecoderReads(CrossAttention):
    """Chunked cross-attention: positions uC+C-1 … (u+1)C+C-2 read the neighbors of chunk u."""

    def forward(self, x_BxSxD: Tensor, encoded: Tensor, angles: Tensor, key_mask: Tensor, readable: Tensor) -> Tensor:
        """encoded [B·L, K, R, D]; key_mask bool [B·L, 1, 1, K·R]; readable [B·L, 1, 1]."""
        (samples, positions, _), (rows, neighbors, _, _) = x_BxSxD.shape, encoded.shape
        chunk, end = self.chunk, rows // samples * self.chunk
        shifted = F.pad(self.q(x_BxSxD)[:, chunk - 1 :], (0, 0, 0, end - positions + chunk - 1))
        q = rotate(self.split(shifted.reshape(rows, chunk, -1)), angles[:, chunk - 1 : 2 * chunk - 1])
        k, v = self.split(self.kv(encoded).flatten(1, 2)).chunk(2, -1)
        k = rotate(k, angles.repeat(1, neighbors, 1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        out = self.out(out.transpose(1, 2).flatten(2)) * readable
        return F.pad(out.reshape(samples, end, -1), (0, 0, chunk - 1, 0))[:, :positions]


class EncoderReads(CrossAttention):
    """Each retrieved token of chunk u's neighbors reads the decoder's C states of chunk u."""

    def forward(self, x_NxRxD: Tensor, decoder_BLxCxD: Tensor, angles: Tensor) -> Tensor:
        (num, length, _), rows = x_NxRxD.shape, len(decoder_BLxCxD)
        q = self.split(self.q(x_NxRxD).view(rows, num // rows * length, -1))
        k, v = self.split(self.kv(decoder_BLxCxD)).chunk(2, -1)
        q, k = rotate(q, angles.repeat(1, num // rows, 1)), rotate(k, angles[:, : self.chunk])
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(num, length, -1))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, width: int, inner: int, heads: int, reads: CrossAttention | None):
        super().__init__()
        bias = not config.disable_bias_linear
        self.attention_norm = norm(config, width)
        self.attention = SelfAttention(width, heads, config.kv_channels or 0, bias)
        self.reads_norm = norm(config, width) if reads else None
        self.reads = reads
        self.mlp_norm = norm(config, width)
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)

    def attend(self, x: Tensor, angles: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.attention(self.attention_norm(x), angles, mask)

    def read(self, x: Tensor, *context: Tensor) -> Tensor:
        return x + self.reads(self.reads_norm(x), *context)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def norm(config: ModelConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width, eps=config.norm_epsilon)


class PlainRetro(nn.Module):
    """Args are finished configs; what the plain model leaves out is asserted."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, vocab_size: int, chunk: int):
        super().__init__()
        assert not (config.swiglu or config.group_query_attention or config.untie_embeddings_and_output_weights)
        assert config.position_embedding_type == "rope" and not (config.hidden_dropout or config.attention_dropout)
        width, heads, head_size = config.hidden_size, config.num_attention_heads, config.kv_channels
        narrow, few = retro.retro_encoder_hidden_size, retro.retro_encoder_num_attention_heads
        assert heads and head_size and narrow and few and config.ffn_hidden_size and retro.retro_encoder_ffn_hidden_size
        bias, self.chunk = not config.disable_bias_linear, chunk
        self.embedding, self.encoder_embedding = nn.Embedding(vocab_size, width), nn.Embedding(vocab_size, narrow)
        self.layers = nn.ModuleList()
        for number in range(1, config.num_layers + 1):
            reads = DecoderReads(width, narrow, heads, head_size, chunk, bias) if number in retro.layers else None
            self.layers.append(Layer(config, width, config.ffn_hidden_size, heads, reads))
        self.encoder_layers = nn.ModuleList()
        for number in range(retro.retro_encoder_layers):
            reads = None if number else EncoderReads(narrow, width, few, head_size, chunk, bias)
            self.encoder_layers.append(Layer(config, narrow, retro.retro_encoder_ffn_hidden_size, few, reads))
        self.norm, self.encoder_norm = norm(config, width), norm(config, narrow)
        length = max(config.seq_length, 2 * chunk)
        self.register_buffer("angles", angles_of(length, head_size, config.rotary_base), persistent=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=config.init_method_std or 0.02)

    def forward(self, tokens_BxS: Tensor, labels_BxS: Tensor, neighbors: Tensor, lengths: Tensor) -> Tensor:
        """Loss of each position [B, S]; neighbors [B, L, K, R], their lengths [B, L, K] (0: no neighbor)."""
        retrieved = neighbors.shape[-1]
        valid = torch.arange(retrieved, device=lengths.device) < lengths[..., None]
        readable = (lengths > 0).any(-1)
        token_mask = (valid | (lengths == 0)[..., None]).view(-1, 1, 1, retrieved)
        key_mask = (valid.flatten(2) | ~readable[..., None]).view(readable.numel(), 1, 1, -1)
        x, encoded = self.embedding(tokens_BxS), None
        readable, angles = readable.view(-1, 1, 1).to(x.dtype), self.angles[:, : x.shape[1]]
        for layer in self.layers:
            x = layer.attend(x, angles)
            if layer.reads is not None:
                if encoded is None:
                    encoded = self.encode(neighbors, layer.reads_norm(x), token_mask)
                x = layer.read(x, encoded, self.angles[:, :retrieved], key_mask, readable)
            x = layer.feed_forward(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels_BxS.flatten(), reduction="none").view_as(labels_BxS)

    def encode(self, neighbors: Tensor, decoder_BxSxD: Tensor, token_mask: Tensor) -> Tensor:
        """[B·L, K, R, D] of the encoder."""
        samples, chunks, num, retrieved = neighbors.shape
        x, angles = self.encoder_embedding(neighbors.view(-1, retrieved)), self.angles[:, :retrieved]
        decoder_BLxCxD = decoder_BxSxD[:, : chunks * self.chunk].reshape(samples * chunks, self.chunk, -1)
        for layer in self.encoder_layers:
            x = layer.attend(x, angles, token_mask)
            if layer.reads is not None:
                x = layer.read(x, decoder_BLxCxD, angles)
            x = layer.feed_forward(x)
        return self.encoder_norm(x).view(samples * chunks, num, retrieved, -1)


class PlainTraining:
    """The model and its update; `step` takes a batch on any device."""

    def __init__(self, model: PlainRetro, optimization: OptimizationConfig, device: torch.device, bf16: bool):
        self.model, self.clip = model.to(device, torch.bfloat16 if bf16 else None), optimization.clip_grad
        self.weights = list(self.model.parameters())
        self.main = [weight.detach().float().requires_grad_() for weight in self.weights] if bf16 else self.weights
        groups = [
            {"params": [main for main in self.main if main.dim() > 1], "weight_decay": optimization.weight_decay},
            {"params": [main for main in self.main if main.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (optimization.adam_beta1, optimization.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimization.lr or 0.0, betas=betas, eps=optimization.adam_eps, fused=True
        )

    def step(self, *batch: Tensor) -> float:
        """One update on (tokens, labels, neighbors, lengths); returns the loss before it."""
        device = self.weights[0].device
        loss = self.model(*(part.to(device, non_blocking=True) for part in batch)).mean()
        loss.backward()
        if self.main is not self.weights:
            for main, weight in zip(self.main, self.weights, strict=True):
                main.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.main, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.main is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.main)
        return loss.item()
