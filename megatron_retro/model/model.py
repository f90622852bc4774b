"""RetroModel: embedding, decoder, output; and what one pipeline stage hands to the next."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_retro.config.form import OURS
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.mcore import (
    ColumnParallelLinear,
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    RotaryEmbedding,
    TransformerConfig,
    await_weights,
    initial_weights,
    parallel_state,
    to_every_tensor_parallel_rank,
)
from megatron_retro.model.attention import Order, causal_within, first_positions
from megatron_retro.model.decoder import RetroDecoder
from megatron_retro.model.feed_forward import gelu_by_tanh, squared_relu
from megatron_retro.model.loss import cross_entropy
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.packing import boundary_rows, pack, unpack
from megatron_retro.model.recompute import Recompute
from megatron_retro.model.stages import StagePlan, plan_stages


class RetroModel(LanguageModule):
    """A GPT whose decoder can read neighbors; without `retro` a plain GPT with the same weight names.

    Args:
        model: finished shape of the decoder.
        retro: finished shape of retrieval; None for a plain GPT.
        parallel: the layout.
        vocab_size: padded vocabulary.
        chunk_length: C; the retrieved length is 2 C.
        seed: of the initial weights, which do not depend on the layout.
        vp_stage: which of this rank's virtual stages; None where there is one.

    Attributes:
        plan: which layers lie on which stage.
    """

    def __init__(
        self,
        model: ModelConfig,
        retro: RetroConfig | None,
        parallel: ParallelConfig,
        vocab_size: int,
        chunk_length: int,
        seed: int,
        vp_stage: int | None = None,
    ):
        plan = plan_stages(model, retro, parallel, vocab_size, chunk_length)
        config = decoder_config(model, parallel, plan)
        super().__init__(config)
        self.plan, self.vp_stage = plan, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        self._form = retro.form if retro else OURS
        self.retrieved_shape: tuple[int, int] | None = None  # R, width of the encoder's output
        if retro:
            assert retro.retro_encoder_hidden_size
            self.retrieved_shape = (2 * chunk_length, retro.retro_encoder_hidden_size)
        self.input_tensor: Tensor | None = None
        if self.pre_process:
            assert model.max_position_embeddings
            with initial_weights(seed, "embedding"):
                self.embedding = LanguageModelEmbedding(
                    config, vocab_size, model.max_position_embeddings, model.position_embedding_type
                )
        self.decoder = RetroDecoder(
            config,
            encoder_config(model, retro, parallel) if retro else None,
            retro_layers=retro.layers if retro else (),
            vocab_size=vocab_size,
            chunk_length=chunk_length,
            angles=rotary_positions(model),
            form=self._form,
            rotary=model.position_embedding_type == "rope",
            last_stage=self.post_process,
            parallel_residual=model.use_parallel_residual,
            recompute=Recompute(parallel.recompute_granularity),
            seed=seed,
            vp_stage=vp_stage,
        )
        if self.post_process:
            with initial_weights(seed, "output"):
                self.output_layer = ColumnParallelLinear(
                    config.hidden_size,
                    vocab_size,
                    config=config,
                    init_method=config.init_method,
                    bias=False,
                    gather_output=False,
                    skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def forward(
        self,
        tokens_BxS: Tensor,
        labels_BxS: Tensor | None = None,
        loss_mask_BxS: Tensor | None = None,
        *,
        order_BxS: Tensor | None = None,
        examples_BxS: Tensor | None = None,
        neighbor_tokens_BxLxKxR: Tensor | None = None,
        neighbor_lengths_BxLxK: Tensor | None = None,
        neighbor_chunks_M: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this pipeline stage.

        Args:
            tokens_BxS: token ids (int64).
            labels_BxS: next tokens (int64).
            loss_mask_BxS: float32, 0 where the position does not count; None counts all.
            order_BxS: int64, the positions of each sample, those with text before those with padding; None where all
                have text.
            examples_BxS: int64, ascending, which example a position belongs to: they do not see each other; not with
                `order_BxS`. None where each sample is one.
            neighbor_tokens_BxLxKxR: retrieved token ids (int64); None, or L = 0, turns retrieval off.
            neighbor_lengths_BxLxK: their numbers of tokens (int64), 0 for no neighbor.
            neighbor_chunks_M: which of the B·L chunks have neighbors (int64, ascending, at least one); None means all.

        Returns:
            On the last stage (loss summed over the counted positions, loss of each position [B, S] without gradient),
            fp32, in nats; or without labels the logits [B, S, V / TP]. Before it the tensor for the next stage.
        """
        num_samples, num_positions = tokens_BxS.shape
        neighbors = encoded = None
        if neighbor_tokens_BxLxKxR is not None and neighbor_tokens_BxLxKxR.numel() and self.retrieved_shape:
            assert neighbor_lengths_BxLxK is not None
            neighbors = self.neighbors(neighbor_tokens_BxLxKxR, neighbor_lengths_BxLxK, neighbor_chunks_M)
        if self.pre_process:
            positions = torch.arange(num_positions, device=tokens_BxS.device).expand(num_samples, -1)
            if examples_BxS is not None:
                positions = positions - first_positions(examples_BxS)
            x_SxBxD = self.embedding(tokens_BxS, positions)
        else:
            assert self.input_tensor is not None
            own_positions = num_positions // self._sequence_parts
            x_SxBxD, encoded = unpack(self.input_tensor, own_positions, self.encoded_shape(neighbors))
        x_SxBxD, encoded = self.decoder(
            x_SxBxD,
            num_positions=num_positions,
            order=None if order_BxS is None else Order.of(order_BxS),
            mask=None if examples_BxS is None else causal_within(examples_BxS),
            neighbors=neighbors,
            encoded_RxKMxD=encoded,
        )
        if not self.post_process:
            return pack(x_SxBxD, encoded, self._encoded_rows(neighbors))
        if labels_BxS is None:
            logits_SxBxV, _ = self.output_layer(x_SxBxD, weight=self.output_weight())
            return logits_SxBxV.transpose(0, 1)
        return self._loss(x_SxBxD, labels_BxS, loss_mask_BxS)

    def neighbors(self, tokens_BxLxKxR: Tensor, lengths_BxLxK: Tensor, chunks_M: Tensor | None = None) -> Neighbors:
        """`Neighbors.of`, as this model reads them."""
        return Neighbors.of(tokens_BxLxKxR, lengths_BxLxK, chunks_M, hides_padding=self._form.hides_padding)

    def _loss(self, x_SxBxD: Tensor, labels_BxS: Tensor, loss_mask_BxS: Tensor | None) -> tuple[Tensor, Tensor]:
        await_weights(self.output_layer)
        weight = self.output_weight()
        if loss_mask_BxS is None:
            loss_mask_BxS = torch.ones_like(labels_BxS, dtype=torch.float32)
        loss, loss_T = cross_entropy(
            to_every_tensor_parallel_rank(x_SxBxD, self.config).flatten(0, 1),
            self.output_layer.weight if weight is None else weight,
            labels_BxS.t().flatten(),
            loss_mask_BxS.t().flatten(),
        )
        return loss, loss_T.view(-1, len(labels_BxS)).t()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by the pipeline schedule with the previous stage's tensor."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def output_weight(self) -> Tensor | None:
        """The embedding's weight where the output layer shares it."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def encoded_shape(self, neighbors: Neighbors | None) -> tuple[int, int, int] | None:
        """This rank's shape of the encoder's output; None with retrieval off."""
        if neighbors is None or self.retrieved_shape is None:
            return None
        length, width = self.retrieved_shape
        return length // self._sequence_parts, len(neighbors.tokens_KMxR), width

    def _encoded_rows(self, neighbors: Neighbors | None) -> int:
        """Rows for the encoder's output in this rank's part of the tensor between stages: of every batch as many."""
        if neighbors is None:
            return 0
        num_samples, num_chunks = neighbors.num_samples, neighbors.num_chunks
        num_neighbors = len(neighbors.tokens_KMxR) // len(neighbors.readable_M)
        return self._rows(num_samples, num_chunks, num_neighbors)

    def boundary_length(self, num_positions: int, num_chunks: int, num_neighbors: int) -> int:
        """Rows of the tensor between pipeline stages, over all sequence-parallel parts.

        Args:
            num_chunks: L, 0 with retrieval off.
        """
        return num_positions + self._sequence_parts * self._rows(1, num_chunks, num_neighbors)

    def _rows(self, num_samples: int, num_chunks: int, num_neighbors: int) -> int:
        if not num_chunks or self.retrieved_shape is None:
            return 0
        length, width = self.retrieved_shape
        shape = (length // self._sequence_parts, num_neighbors * num_samples * num_chunks, width)
        return boundary_rows(shape, num_samples, self.config.hidden_size)

    @property
    def _sequence_parts(self) -> int:
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    def boundary_bytes(self, num_positions: int, num_samples: int, num_chunks: int, num_neighbors: int) -> int:
        """Bytes of that tensor for a micro-batch, over all sequence-parallel parts; its gradient has as many."""
        rows = self.boundary_length(num_positions, num_chunks, num_neighbors)
        return rows * num_samples * self.config.hidden_size * self.config.pipeline_dtype.itemsize


def make_stages(
    model: ModelConfig,
    retro: RetroConfig | None,
    parallel: ParallelConfig,
    vocab_size: int,
    chunk_length: int,
    seed: int,
) -> list[RetroModel]:
    """This rank's part of the model, as `RetroModel` takes it: one for each of its virtual stages."""
    stages = range(parallel.virtual_stages) if parallel.virtual_stages > 1 else [None]
    return [RetroModel(model, retro, parallel, vocab_size, chunk_length, seed, stage) for stage in stages]


def decoder_config(model: ModelConfig, parallel: ParallelConfig, plan: StagePlan | None = None) -> TransformerConfig:
    """The decoder's shape and layout in megatron-core's terms; without a plan all of it lies on one stage."""
    stages = parallel.pipeline_model_parallel_size if plan else 1
    dtype = torch.bfloat16 if parallel.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.kv_channels,
        num_query_groups=model.num_query_groups,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=activation(model),
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if plan and parallel.virtual_stages > 1 else None,
        pipeline_model_parallel_layout=plan.layout if plan and stages > 1 else None,
        batch_p2p_comm=parallel.virtual_stages == 1,  # see `mcore.run_pipeline`
        sequence_parallel=parallel.sequence_parallel,
        bf16=parallel.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        use_cpu_initialization=True,  # the same initial weights at every layout
        calculate_per_token_loss=True,  # the loss is a mean over predicted tokens, wherever they lie
        deallocate_pipeline_outputs=True,
    )


def rotary_positions(model: ModelConfig) -> RotaryEmbedding:
    """The angles of each position, in self-attention (of rotary models) and in cross-attention."""
    assert model.kv_channels
    return RotaryEmbedding(
        model.kv_channels,
        model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        use_cpu_initialization=True,
    )


def activation(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The MLP's activation function; with SwiGLU that of its gate."""
    if model.swiglu:
        return torch.nn.functional.silu
    if model.squared_relu:
        return squared_relu
    return gelu_by_tanh if model.openai_gelu else torch.nn.functional.gelu


def encoder_config(model: ModelConfig, retro: RetroConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The encoder's shape; it lives on one pipeline stage, whatever the decoder does."""
    return decoder_config(encoder_shape(model, retro), parallel)


def encoder_shape(model: ModelConfig, retro: RetroConfig) -> ModelConfig:
    """The encoder's flags: the decoder's but for its size."""
    heads, width = retro.retro_encoder_num_attention_heads, retro.retro_encoder_hidden_size
    assert heads and width
    return dataclasses.replace(
        model,
        num_layers=retro.retro_encoder_layers,
        hidden_size=width,
        ffn_hidden_size=retro.retro_encoder_ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=heads,
    )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that it divides evenly; the same at every layout whose TP divides `divisible_by`."""
    multiple = divisible_by
    while multiple % tensor_parallel_size:
        multiple += divisible_by
    return -(-vocab_size // multiple) * multiple
