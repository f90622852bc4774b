"""RetroDecoder: the whole idea in one forward."""

import torch
from torch import Tensor

from megatron_retro.config.form import Form
from megatron_retro.mcore import (
    MegatronModule,
    RotaryEmbedding,
    TransformerConfig,
    initial_weights,
    layers_of_this_stage,
)
from megatron_retro.model.attention import ChunkedCrossAttention, NoAngles, Order, Pattern
from megatron_retro.model.encoder import RetroEncoder
from megatron_retro.model.layer import Layer, LayerStack, Norm
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.recompute import Recompute


class RetroDecoder(MegatronModule):
    """This pipeline stage's layers; without RETRO layers it is a plain GPT decoder.

    Args:
        config: the decoder's shape.
        encoder_config: the encoder's; None for a plain GPT.
        retro_layers: numbers (from 1, over all stages) of the layers that read neighbors.
        vocab_size: padded vocabulary, for the encoder's embedding.
        chunk_length: C.
        angles: of rotary positions.
        rotary: whether self-attention has them.
        form: what RETRO computes; cross-attention has rotary positions if it says so.
        parallel_residual: whether each layer's MLP lies beside its self-attention.
        last_stage: whether this stage has the normalization behind the last layer.
        recompute: what the backward pass makes again.
        seed: of the initial weights.
        vp_stage: which of this rank's virtual stages; None where there is one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder_config: TransformerConfig | None,
        *,
        retro_layers: tuple[int, ...],
        vocab_size: int,
        chunk_length: int,
        angles: RotaryEmbedding,
        rotary: bool,
        form: Form,
        parallel_residual: bool,
        last_stage: bool,
        recompute: Recompute,
        seed: int,
        vp_stage: int | None = None,
    ):
        super().__init__(config)
        self.first_retro_layer = min(retro_layers, default=0)
        self.retrieved_length = 2 * chunk_length
        self.angles, self.rotary = angles, rotary
        self._reading_angles = angles if form.rotary_reading else NoAngles()
        self.layers = LayerStack(config)
        self.encoder: RetroEncoder | None = None
        numbers = layers_of_this_stage(config, vp_stage)
        for number in numbers:
            reads = None
            if number in retro_layers:
                assert encoder_config
                with initial_weights(seed, f"cross-attention {number}"):
                    reads = ChunkedCrossAttention(config, encoder_config.hidden_size, chunk_length)
            with initial_weights(seed, f"layer {number}"):
                self.layers.append(
                    Layer(
                        config,
                        number,
                        causal=True,
                        parallel=parallel_residual,
                        recompute=recompute,
                        cross_attention=reads,
                    )
                )
        if self.first_retro_layer in numbers:
            assert encoder_config
            self.encoder = RetroEncoder(
                encoder_config,
                vocab_size,
                config.hidden_size,
                chunk_length,
                self.retrieved_length,
                self._reading_angles,
                not rotary and not form.rotary_reading,
                form,
                recompute,
                seed,
            )
        self.final_layernorm: torch.nn.Module | None = None
        if last_stage:
            self.final_layernorm = Norm(config) if form.decoder_norm else torch.nn.Identity()

    def reading_angles(self) -> Tensor:
        """Of rotary positions in cross-attention, [R, 1, 1, E]; E is 0 where it has none."""
        return self._reading_angles(self.retrieved_length)

    def forward(
        self,
        x_SxBxD: Tensor,
        *,
        num_positions: int,
        order: Order | None = None,
        mask: Tensor | None = None,
        neighbors: Neighbors | None = None,
        encoded_RxKMxD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run this stage's layers.

        Args:
            x_SxBxD: hidden states; under sequence parallelism this rank's part of S.
            num_positions: S.
            order: of the positions in self-attention; None where no position is padding.
            mask: of self-attention, as in `attend`; None where each position looks at all before it.
            neighbors: retrieved tokens; None turns retrieval off.
            encoded_RxKMxD: the encoder's output when an earlier stage made it.

        Returns:
            (hidden states, the encoder's output or None).
        """
        pattern = Pattern(self.angles(num_positions) if self.rotary else None, mask, order)
        for layer in self.layers:
            x_SxBxD = layer.attend(x_SxBxD, pattern)
            if neighbors is not None and layer.cross_attention is not None:
                if layer.number == self.first_retro_layer:
                    assert self.encoder is not None and layer.pre_cross_attn_layernorm is not None
                    encoded_RxKMxD = self.encoder(neighbors, layer.pre_cross_attn_layernorm(x_SxBxD))
                assert encoded_RxKMxD is not None
                x_SxBxD = layer.read(x_SxBxD, encoded_RxKMxD, neighbors, self.reading_angles())
            x_SxBxD = layer.feed_forward(x_SxBxD)
        if self.final_layernorm is not None:
            x_SxBxD = self.final_layernorm(x_SxBxD)
        return x_SxBxD, encoded_RxKMxD
