"""Flags of the model's shape, and the values that follow from others."""

import dataclasses
import math

from megatron_retro.config import form
from megatron_retro.config.flags import at_least, check_timeout, flag, flag_name
from megatron_retro.errors import UserError

RETRIEVAL_MODES = ("on", "off", "random")  # of evaluation and generation
QA_PROMPT = "Question: {question}\nAnswer:"


@dataclasses.dataclass
class RetroConfig:
    """RETRO: retrieval, encoder, chunked cross-attention"""

    retro_add_retriever: bool = flag(False, "train RETRO; without it the plain GPT, on the same samples")
    retro_work_dir: str | None = flag(None, "work dir that tools/preprocess_retro_data.py built")
    retro_num_neighbors: int = flag(2, "neighbors read by each chunk (K)")
    retro_layers: str | None = flag(
        None,
        "decoder layers with cross-attention, from 1, like 6,9,12",
        show="every third from 6, or from 9 above 15 layers",
    )
    retro_encoder_layers: int = flag(2, "layers of the neighbor encoder")
    retro_encoder_hidden_size: int | None = flag(None, "width of the neighbor encoder", show="--hidden-size")
    retro_encoder_ffn_hidden_size: int | None = flag(None, "its MLP's width", show="in the decoder's proportion")
    retro_encoder_num_attention_heads: int | None = flag(None, "its heads", show="its width / --kv-channels")
    retro_as_megatron_lm: str | None = flag(
        None,
        "compute what Megatron-LM's RETRO did, for its checkpoints: as it was before megatron-core, as with it, or as "
        "with its later releases, which leave out the last normalization",
        choices=tuple(form.MEGATRON_LM),
    )
    retro_retrieval_dropout: float = flag(0.1, "share of training samples whose neighbors are all hidden")
    retro_random_neighbor_prob: float = flag(0.05, "share of training samples that get random neighbors")
    retro_max_overlap: float = flag(
        1.0, "training reads no neighbor that shares a longer run of tokens with its chunk than this share of a chunk"
    )
    retro_freeze_decoder: bool = flag(False, "train encoder and cross-attention alone; other weights stay as they are")

    def finish(self, model: "ModelConfig") -> None:
        """Fill in what follows from the decoder; check. Call after `model.finish()`.

        Raises:
            UserError: names the flag, both values and what would fit.
        """
        if self.retro_layers is None:
            self.retro_layers = ",".join(map(str, default_retro_layers(model.num_layers)))
        if self.retro_encoder_hidden_size is None:
            self.retro_encoder_hidden_size = model.hidden_size
        if self.retro_encoder_ffn_hidden_size is None:
            assert model.ffn_hidden_size
            self.retro_encoder_ffn_hidden_size = (
                self.retro_encoder_hidden_size * model.ffn_hidden_size // model.hidden_size
            )
        if self.retro_encoder_num_attention_heads is None:
            assert model.kv_channels
            self.retro_encoder_num_attention_heads = max(1, self.retro_encoder_hidden_size // model.kv_channels)
        if self.retro_as_megatron_lm:
            self._check_as_megatron_lm(model)
        encoder = ("layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        at_least(1, self, "retro_num_neighbors", *(f"retro_encoder_{field}" for field in encoder))
        for name in ("retro_retrieval_dropout", "retro_random_neighbor_prob", "retro_max_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{flag_name(name)} is {getattr(self, name)}; it is a share, from 0 to 1")
        if self.retro_retrieval_dropout + self.retro_random_neighbor_prob > 1:
            raise UserError(
                f"--retro-retrieval-dropout {self.retro_retrieval_dropout} and --retro-random-neighbor-prob "
                f"{self.retro_random_neighbor_prob} add up to more than 1"
            )
        for number in self.layers:
            if not 1 <= number <= model.num_layers:
                raise UserError(
                    f"--retro-layers names layer {number}; --num-layers {model.num_layers} has 1 … {model.num_layers}"
                )

    def _check_as_megatron_lm(self, model: "ModelConfig") -> None:
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads"):
            of_encoder, of_decoder = getattr(self, f"retro_encoder_{name}"), getattr(model, name)
            if of_encoder != of_decoder:
                raise UserError(
                    f"{flag_name(f'retro_encoder_{name}')} is {of_encoder}, {flag_name(name)} {of_decoder}; with "
                    "--retro-as-megatron-lm they must be the same"
                )
        for name in ("group_query_attention", "use_parallel_residual"):
            if getattr(model, name):
                raise UserError(f"Megatron-LM's RETRO had no {flag_name(name)}; leave it or --retro-as-megatron-lm out")

    @property
    def form(self) -> form.Form:
        """What the model computes."""
        return form.MEGATRON_LM[self.retro_as_megatron_lm] if self.retro_as_megatron_lm else form.OURS

    @property
    def layers(self) -> tuple[int, ...]:
        """The RETRO layers, ascending, numbered from 1."""
        try:
            return tuple(sorted({int(number) for number in str(self.retro_layers).split(",")}))
        except ValueError:
            raise UserError(f"--retro-layers is {self.retro_layers!r}; it takes numbers like 6,9,12") from None


@dataclasses.dataclass
class ModelConfig:
    """Model"""

    num_layers: int = flag(12, "decoder layers")
    hidden_size: int = flag(768, "decoder width (D)")
    ffn_hidden_size: int | None = flag(None, "width inside the MLP", show="4 D; with --swiglu 8/3 D up to 64s")
    num_attention_heads: int | None = flag(None, "attention heads", show="D / 64")
    kv_channels: int | None = flag(None, "width of a head", show="D / heads")
    group_query_attention: bool = flag(False, "share keys and values among --num-query-groups groups of heads")
    num_query_groups: int | None = flag(None, "groups of --group-query-attention", show="a quarter of the heads")
    seq_length: int = flag(1024, "tokens a sample (S)")
    max_position_embeddings: int | None = flag(None, "longest sequence", show="--seq-length")
    position_embedding_type: str = flag("rope", "positions of the decoder", choices=("rope", "learned_absolute"))
    rotary_base: int = flag(10000, "base period of rotary positions")
    rotary_percent: float = flag(1.0, "share of a head's width that rotary positions turn")
    use_rope_scaling: bool = flag(False, "stretch slow rotary positions as Llama 3.1 does")
    rope_scaling_factor: float = flag(8.0, "of --use-rope-scaling")
    normalization: str = flag("LayerNorm", "normalization", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = flag(1e-5, "epsilon of the normalization")
    swiglu: bool = flag(False, "SwiGLU in place of GELU")
    squared_relu: bool = flag(False, "squared ReLU in place of GELU")
    openai_gelu: bool = flag(False, "GELU by its tanh approximation, as GPT-2 has it")
    disable_bias_linear: bool = flag(False, "linear layers without biases")
    add_qkv_bias: bool = flag(False, "biases of queries, keys and values although --disable-bias-linear, as Qwen2 has")
    qk_layernorm: bool = flag(False, "normalize each head's queries and keys, as Qwen3 does")
    use_parallel_residual: bool = flag(False, "the MLP beside self-attention, not behind it, as GPT-NeoX has it")
    untie_embeddings_and_output_weights: bool = flag(False, "an output layer of its own")
    hidden_dropout: float = flag(0.0, "dropout on each residual branch")
    attention_dropout: float = flag(0.0, "dropout on attention weights")
    init_method_std: float | None = flag(None, "standard deviation of initial weights", show="sqrt(2 / 5 D)")
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this")

    def finish(self) -> None:
        """Fill in what follows from other values; check.

        Raises:
            UserError: names the flag, both values and what would fit.
        """
        at_least(1, self, "num_layers", "hidden_size", "seq_length")
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        at_least(1, self, "num_attention_heads")
        if self.kv_channels is None:
            _divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            self.kv_channels = self.hidden_size // self.num_attention_heads
        at_least(1, self, "kv_channels")
        if self.kv_channels % 2:
            raise UserError(f"--kv-channels is {self.kv_channels}; rotary positions need an even width of a head")
        if not 0 < self.rotary_percent <= 1:
            raise UserError(f"--rotary-percent is {self.rotary_percent}; it takes a share above 0, up to 1")
        if self.rotary_width < 2 or self.rotary_width % 2:
            raise UserError(
                f"--rotary-percent {self.rotary_percent} turns {self.rotary_width} numbers of --kv-channels "
                f"{self.kv_channels}; they must be even in number, at least 2"
            )
        activations = [flag_name(name) for name in ("swiglu", "squared_relu", "openai_gelu") if getattr(self, name)]
        if len(activations) > 1:
            raise UserError(f"{' and '.join(activations)} are different activation functions; leave one out")
        if self.ffn_hidden_size is None:
            glu_width = -(-self.hidden_size * 8 // 3 // 64) * 64
            self.ffn_hidden_size = glu_width if self.swiglu else 4 * self.hidden_size
        at_least(1, self, "ffn_hidden_size")
        if not self.group_query_attention:
            if self.num_query_groups not in (None, self.num_attention_heads):
                raise UserError(f"--num-query-groups {self.num_query_groups} needs --group-query-attention")
            self.num_query_groups = self.num_attention_heads
        elif self.num_query_groups is None:
            self.num_query_groups = max(1, self.num_attention_heads // 4)
        _divides("num_query_groups", self.num_query_groups or 0, "num_attention_heads", self.num_attention_heads)
        if (
            self.init_method_std is None
        ):  # Nguyen and Salazar, arXiv 1910.05895; 0.02 leaves small models' attention flat
            self.init_method_std = math.sqrt(2 / (5 * self.hidden_size))
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag_name(name)} is {getattr(self, name)}; it lies from 0 to below 1")
        if self.max_position_embeddings is None:
            self.max_position_embeddings = self.seq_length
        if self.max_position_embeddings < self.seq_length:
            raise UserError(
                f"--max-position-embeddings {self.max_position_embeddings} is less than --seq-length {self.seq_length}"
            )

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that rotary positions turn."""
        return int((self.kv_channels or 0) * self.rotary_percent)


def check_qa_prompt(template: str) -> None:
    """Refuse a --qa-prompt that no question goes into.

    Raises:
        UserError: names the value.
    """
    if "{question}" not in template:
        raise UserError(f"--qa-prompt is {template!r}; it must hold {{question}}, in braces")


@dataclasses.dataclass
class ParallelConfig:
    """Parallelism and precision"""

    tensor_model_parallel_size: int = flag(1, "ranks that share every layer (TP)")
    pipeline_model_parallel_size: int = flag(1, "ranks that share out the layers (PP)")
    sequence_parallel: bool = flag(False, "shard activations between the tensor-parallel parts along the sequence")
    bf16: bool = flag(False, "train in bfloat16 with fp32 main weights; without it fp32")
    distributed_timeout_minutes: float = flag(
        10, "minutes without a sign of a rank, or without progress of any, until the others give up"
    )

    def finish(self, world_size: int, model: ModelConfig, retro: RetroConfig | None) -> None:
        """Check that the layout fits the ranks and the model.

        Raises:
            UserError: names the flag, both values and what would fit.
        """
        tensor, stages = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        at_least(1, self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        check_timeout(self.distributed_timeout_minutes)
        if world_size % (tensor * stages):
            raise UserError(
                f"--tensor-model-parallel-size {tensor} × --pipeline-model-parallel-size {stages} must divide the "
                f"{world_size} ranks; start torchrun with a multiple of {tensor * stages}"
            )
        if self.sequence_parallel and tensor == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1")
        if self.given_stage_layers is None and stages * self.virtual_stages > model.num_layers:
            virtual = f" × --num-virtual-stages-per-pipeline-rank {self.virtual_stages}" * (self.virtual_stages > 1)
            raise UserError(
                f"--pipeline-model-parallel-size {stages}{virtual} makes more stages than --num-layers "
                f"{model.num_layers} has layers; take fewer"
            )
        _divides("tensor_model_parallel_size", tensor, "num_attention_heads", model.num_attention_heads or 0)
        _divides("tensor_model_parallel_size", tensor, "num_query_groups", model.num_query_groups or 0)
        _divides("tensor_model_parallel_size", tensor, "ffn_hidden_size", model.ffn_hidden_size or 0)
        if self.sequence_parallel:
            _divides("tensor_model_parallel_size", tensor, "seq_length", model.seq_length)
        if retro:
            for name in ("retro_encoder_num_attention_heads", "retro_encoder_ffn_hidden_size"):
                _divides("tensor_model_parallel_size", tensor, name, getattr(retro, name))

    @property
    def ranks_of_a_model(self) -> int:
        """Ranks that hold the weights once (TP × PP)."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def virtual_stages(self) -> int:
        """Stages that each pipeline rank holds (VPP)."""
        return 1

    @property
    def recompute_granularity(self) -> str | None:
        """What the backward pass makes again; None for nothing."""
        return None

    @property
    def given_stage_layers(self) -> tuple[int, ...] | None:
        """Layers of each stage, where they were asked for."""
        return None

    def check_retrieved_length(self, retrieved_length: int) -> None:
        """Check that sequence parallelism can shard the encoder's `retrieved_length` tokens (2C, from the work dir)."""
        if self.sequence_parallel and retrieved_length % self.tensor_model_parallel_size:
            raise UserError(
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size} with --sequence-parallel does not "
                f"divide the {retrieved_length} tokens of a neighbor (twice the work dir's --retro-chunk-length)"
            )


def default_retro_layers(num_layers: int) -> tuple[int, ...]:
    """Every third layer from 6, or from 9 above 15 layers (as Megatron-LM did); below 6 layers from the middle."""
    first = 9 if num_layers > 15 else 6 if num_layers >= 6 else max(1, num_layers // 2)
    return tuple(range(first, num_layers + 1, 3))


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise UserError(f"{flag_name(divisor_name)} {divisor} does not divide {flag_name(name)} {value}")
