"""Arithmetic of a model: multiply-adds a decoder token, by the shapes alone.

A multiply-add is two floating-point operations; a training step costs three forward passes (Kaplan et al., arXiv
2001.08361, §2.1). Only matrix products count: normalization, softmax and activations are left out.
"""

import dataclasses

from megatron_retro.config.model import ModelConfig, RetroConfig


@dataclasses.dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of a forward pass a decoder token.

    Attributes:
        decoder: layers without what reads neighbors.
        logits: the output layer.
        cross_attention: chunked cross-attention, the neighbors' keys and values among it.
        encoder: of the neighbors that a token's chunk reads, a chunk's share.
    """

    decoder: float
    logits: float
    cross_attention: float = 0.0
    encoder: float = 0.0

    @property
    def total(self) -> float:
        return self.decoder + self.logits + self.cross_attention + self.encoder

    @property
    def training_flops(self) -> float:
        """Floating-point operations of forward and backward pass a token."""
        return 6 * self.total


def multiply_adds(
    model: ModelConfig,
    retro: RetroConfig | None,
    *,
    vocab_size: int,
    chunk_length: int,
    context: float | None = None,
    reading: float = 1.0,
) -> MultiplyAdds:
    """Of a model whose configs are finished.

    Args:
        retro: None for a GPT, or with retrieval off.
        vocab_size: the output layer's rows, padding included.
        chunk_length: C; a neighbor has R = 2C tokens.
        reading: share of the chunks that have neighbors.
        context: keys that self-attention sees on average; None means half of S, which is what causal training needs.
    """
    assert model.ffn_hidden_size and model.num_attention_heads and model.kv_channels and model.num_query_groups
    width, seen = model.hidden_size, model.seq_length / 2 if context is None else context
    queries, keys_values = model.num_attention_heads * model.kv_channels, 2 * model.num_query_groups * model.kv_channels
    matrices = 3 if model.swiglu else 2  # of an MLP
    layer = width * (2 * queries + keys_values) + 2 * queries * seen + matrices * width * model.ffn_hidden_size
    gpt = MultiplyAdds(model.num_layers * layer, width * vocab_size)
    if retro is None:
        return gpt

    retrieved, neighbors = 2 * chunk_length, retro.retro_num_neighbors
    tokens = reading * neighbors * retrieved / chunk_length  # of the encoder, for each of the decoder's
    narrow, heads = retro.retro_encoder_hidden_size, retro.retro_encoder_num_attention_heads
    assert narrow and heads and retro.retro_encoder_ffn_hidden_size
    inner = heads * model.kv_channels
    cross = 2 * width * queries + tokens * narrow * keys_values + 2 * queries * tokens * chunk_length
    own_layer = 4 * narrow * inner + 2 * inner * retrieved + matrices * narrow * retro.retro_encoder_ffn_hidden_size
    reads_decoder = 2 * narrow * inner + 2 * inner * chunk_length  # a token of a neighbor
    return dataclasses.replace(
        gpt,
        cross_attention=len(retro.layers) * cross,
        encoder=tokens * (retro.retro_encoder_layers * own_layer + reads_decoder) + 2 * width * inner,
    )
