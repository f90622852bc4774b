"""RetroEncoder: retrieved tokens, read in the light of the chunk they were retrieved for."""

import torch
from torch import Tensor

from megatron_retro.config.form import Form
from megatron_retro.mcore import (
    LanguageModelEmbedding,
    MegatronModule,
    RotaryEmbedding,
    TransformerConfig,
    initial_weights,
)
from megatron_retro.model.attention import EncoderCrossAttention, NoAngles, Pattern
from megatron_retro.model.layer import Layer, LayerStack, Norm
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.recompute import Recompute


class RetroEncoder(MegatronModule):
    """Bidirectional transformer over each neighbor (arXiv 2112.04426, §2.4).

    Layer 1 also attends to the decoder's hidden states of the chunk that retrieved the neighbor. It has its own token
    embedding, so it can live on another pipeline stage than the decoder's, and its own width. Where the widths are
    equal the two embeddings start equal: copying a retrieved token then needs no map between two vocabularies.

    Args:
        config: the encoder's shape.
        vocab_size: padded vocabulary.
        decoder_hidden_size: width of what layer 1 reads.
        chunk_length: C.
        retrieved_length: R.
        angles: of rotary positions.
        learned_positions: whether the embedding has positions too.
        form: what is computed.
        recompute: what the backward pass makes again.
        seed: of the initial weights.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        decoder_hidden_size: int,
        chunk_length: int,
        retrieved_length: int,
        angles: RotaryEmbedding | NoAngles,
        learned_positions: bool,
        form: Form,
        recompute: Recompute,
        seed: int,
    ):
        super().__init__(config)
        self.angles = angles
        with initial_weights(seed, "embedding"):
            positions = "learned_absolute" if learned_positions else "rope"
            self.embedding = LanguageModelEmbedding(config, vocab_size, retrieved_length, positions)
        with initial_weights(seed, "encoder"):
            reads = EncoderCrossAttention(config, decoder_hidden_size, chunk_length)
            self.layers = LayerStack(config)
            for number in range(1, config.num_layers + 1):
                cross_attention = reads if number == 1 else None
                self.layers.append(
                    Layer(
                        config,
                        number,
                        causal=False,
                        normed_residual=form.normed_residual,
                        recompute=recompute,
                        cross_attention=cross_attention,
                    )
                )
        self.final_layernorm = Norm(config) if form.encoder_norm else torch.nn.Identity()

    def forward(self, neighbors: Neighbors, decoder_SxBxD: Tensor) -> Tensor:
        """Encode all neighbors of a batch.

        Args:
            neighbors: their tokens.
            decoder_SxBxD: the decoder's hidden states after self-attention of the first RETRO layer, normalized.

        Returns:
            [R, K·M, encoder width]; under sequence parallelism this rank's part of R.
        """
        tokens = neighbors.tokens_KMxR
        angles, positions = self.angles(tokens.shape[1]), torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens, positions.expand_as(tokens))
        pattern = Pattern(angles, mask=neighbors.token_mask)
        for layer in self.layers:
            x = layer.attend(x, pattern)
            if layer.cross_attention is not None:
                x = layer.read(x, decoder_SxBxD, neighbors, angles)
            x = layer.feed_forward(x)
        return self.final_layernorm(x)
