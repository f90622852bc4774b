"""The only module that knows megatron-core's versions and the CPU's differences.

Everything the project takes from megatron-core comes through here: process groups, parallel linears, schedules,
optimizer, distributed checkpoints. Tested with 0.16.1.
"""

import contextlib
import functools
import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# What megatron-core says on import and in use that its user can do nothing about.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "`load_state_dict` is deprecated",
    "`torch.distributed.*` is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized",
):
    warnings.filterwarnings("ignore", message=_message)

# ruff: noqa: E402
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_retro import distributed, mcore_optimizer, mcore_writer, watch
from megatron_retro.errors import UserError
from megatron_retro.mcore_cpu import TypeNamesMode, redirect_to_cpu

__all__ = [
    "MLP",
    "AttnMaskType",
    "ColumnParallelLinear",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "LanguageModelEmbedding",
    "LanguageModule",
    "MLPSubmodules",
    "MegatronModule",
    "ModelChunks",
    "ModelType",
    "OptimizerParamScheduler",
    "PipelineParallelLayerLayout",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "StoredWeights",
    "TransformerConfig",
    "add_residual",
    "checkpoint",
    "fused_attention",
    "get_cuda_rng_tracker",
    "one_kernel",
    "parallel_state",
]

# How dist_checkpointing names things: every layer has parameters of its own kind, so none is stacked over layers; and a
# distributed optimizer's shards are stored as the parameters they belong to, so that any layout loads them.
_CHECKPOINT_FORMAT = {
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}

_BYTES_BESIDE = 2100  # a tensor in a checkpoint: its name, shape and place


# ------------------------------------------------------------------------------------------------ data


def blend(weights: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """How Megatron interleaves the samples of corpora, by weights [corpora] that sum to 1.

    Returns:
        ([num_samples] int16 corpus of each sample, [num_samples] int64 its number among those of the corpus).
    """
    from megatron.core.datasets.helpers import build_blending_indices  # made by a compiler where it was not shipped

    corpus, sample = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    build_blending_indices(corpus, sample, list(map(float, weights)), len(weights), num_samples, False)
    return corpus, sample


# ------------------------------------------------------------------------------------------------ processes


def has_gpu() -> bool:
    """Whether this rank computes on one; a simulated rank does not."""
    return torch.cuda.is_available() and not _is_simulated()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def initialize(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    *,
    virtual_stages: int = 1,
    timeout_minutes: float = 10,
) -> None:
    """Join the ranks (nccl with CUDA, gloo without; one plain process is a world of one) and form the groups.

    Each rank has chosen its GPU before (`distributed.use_this_ranks_share`).

    Args:
        virtual_stages: stages that each pipeline rank holds.
    """
    _set_environment()
    if not has_gpu():
        redirect_to_cpu()
    if not dist.is_initialized():
        backend = "nccl" if has_gpu() else "gloo"
        if "RANK" in os.environ:
            distributed.join(backend, timeout_minutes)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_parallel_size,
        pipeline_parallel_size,
        virtual_stages if virtual_stages > 1 else None,
        distributed_timeout_minutes=distributed.collective_timeout(timeout_minutes).total_seconds() / 60,  # type: ignore[arg-type]
    )
    reseed(0)


@contextlib.contextmanager
def simulated_rank(
    rank: int,
    world_size: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    *,
    virtual_stages: int = 1,
) -> Iterator[None]:
    """Be one rank of a world that has no others: groups form, communication returns at once and moves nothing.

    It computes as on a CPU, and this process does so from then on.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _set_environment()
    redirect_to_cpu()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_parallel_size,
            pipeline_parallel_size,
            virtual_stages if virtual_stages > 1 else None,
            create_gloo_process_groups=False,
        )
        reseed(0)
        yield
    finally:
        shut_down()


def _set_environment() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # sequence parallelism overlaps better so


def _is_simulated() -> bool:
    return dist.is_initialized() and dist.get_backend() == "fake"


def shut_down() -> None:
    """Leave the groups and the process group, when all ranks have done their part."""
    watch.close()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def reseed(seed: int) -> None:
    """Start every random stream anew: equal over data- and tensor-parallel ranks, but for the tensor-parallel stream.

    Called before each step with a seed made of (run seed, step), so a run resumes without stored random states.
    """
    seed = (seed + 100 * parallel_state.get_pipeline_model_parallel_rank()) % 2**31
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def initial_weights(seed: int, name: str) -> Iterator[None]:
    """Draw the weights made in this block from a stream of their own.

    Initial weights then depend on (seed, name) alone, not on which rank or stage makes what before them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # torch's generator takes 32 bits
        yield


def sharded_dropout(config: TransformerConfig) -> contextlib.AbstractContextManager:
    """Around dropout on sequence-sharded activations: each tensor-parallel rank draws its own mask."""
    return get_cuda_rng_tracker().fork() if config.sequence_parallel else contextlib.nullcontext()


def layers_of_this_stage(config: TransformerConfig, vp_stage: int | None = None) -> range:
    """Numbers (from 1) of the decoder layers that this pipeline stage holds."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    offset = get_transformer_layer_offset(config, vp_stage, rank)
    return range(offset + 1, offset + get_num_layers_to_build(config, vp_stage, rank) + 1)


# -------------------------------------------------------------------------------------------------- kernels


def one_kernel(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An element-wise function without gradient, on a GPU compiled into one kernel; on a CPU it runs as it is.

    torch.compile makes a kernel for each kind of input (gradient mode, sizes of 1, strides), up to its limit; kinds
    that come later run as they are. `TORCH_COMPILE_DISABLE=1` turns compiling off.
    """

    @functools.wraps(function)
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (compiled(function) if inputs[0].is_cuda else function)(*(given.detach() for given in inputs))

    return call


@functools.cache
def compiled(function: Callable[..., torch.Tensor], backend: str = "inductor") -> Callable[..., torch.Tensor]:
    """As `one_kernel` compiles it."""
    return torch.compile(function, dynamic=True, backend=backend)


def fused_attention(
    q_NxHxSxE: torch.Tensor,
    k_NxGxTxE: torch.Tensor,
    v_NxGxTxE: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """torch's fused attention [N, H, S, E]; heads may share G groups of keys and values.

    On a CPU the backward pass that is not causal takes twice as long in bf16 as in fp32: there it computes in fp32, but
    for the single positions of generation.
    """
    (_, num_heads, num_positions, _), dtype = q_NxHxSxE.shape, q_NxHxSxE.dtype
    num_groups = k_NxGxTxE.shape[1]
    # Kernels that take a mask take no groups: where all queries look alike, a group's heads become more queries.
    as_queries = num_groups < num_heads and mask is not None and mask.shape[1:3] == (1, 1)
    if as_queries:
        q_NxHxSxE = q_NxHxSxE.unflatten(1, (num_groups, -1)).flatten(2, 3)
    elif num_groups < num_heads and mask is not None:
        k_NxGxTxE, v_NxGxTxE = (x.repeat_interleave(num_heads // num_groups, 1) for x in (k_NxGxTxE, v_NxGxTxE))
        num_groups = num_heads
    if dtype == torch.bfloat16 and not q_NxHxSxE.is_cuda and not causal and num_positions > 1:
        q_NxHxSxE, k_NxGxTxE, v_NxGxTxE = q_NxHxSxE.float(), k_NxGxTxE.float(), v_NxGxTxE.float()
    out = torch.nn.functional.scaled_dot_product_attention(
        q_NxHxSxE,
        k_NxGxTxE,
        v_NxGxTxE,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=num_groups < num_heads and not as_queries,
    )
    if as_queries:
        out = out.unflatten(2, (-1, num_positions)).flatten(1, 2)
    return out.to(dtype)


def add_residual(
    out_and_bias: tuple[torch.Tensor, torch.Tensor | None], x: torch.Tensor, dropout: float, training: bool
) -> torch.Tensor:
    """x + dropout(output + bias), on a GPU in one kernel."""
    return get_bias_dropout_add(training, has_gpu())(out_and_bias, x, dropout)


# ------------------------------------------------------------------------------------------------- training


class ModelChunks(torch.nn.ModuleList):
    """This rank's part of a model in training: a `DistributedDataParallel` for each of its virtual stages."""

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()

    def zero_grad_buffer(self) -> None:
        for chunk in self:
            chunk.zero_grad_buffer()

    def gather_weights(self) -> None:
        """Wait for updated weights that are gathered only when forward asks for them."""
        for chunk in self:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def wrap_for_training(
    *stages: LanguageModule,
    use_distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    grad_reduce_in_bf16: bool = False,
) -> ModelChunks:
    """Move a model to this rank's device, in its precision, under megatron-core's data parallelism.

    Args:
        stages: this rank's, in the model's order.
        use_distributed_optimizer: shard what `build_optimizer` makes over the data-parallel ranks.
        overlap_grad_reduce: sum gradients during backward. Every parameter then needs one in each last micro-batch.
        overlap_param_gather: gather the weights that a distributed optimizer updated during forward.
        grad_reduce_in_bf16: for bf16 models; gradients are else accumulated and summed in fp32.
    """
    chunks = ModelChunks()
    for stage in stages:
        config, model = stage.config, stage.to(device())
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=not grad_reduce_in_bf16,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
        )
        module = Float16Module(config, model) if config.bf16 else model
        chunk = DistributedDataParallel(config, ddp_config, module, disable_bucketing=len(chunks) > 0)
        chunk.broadcast_params()
        chunks.append(chunk)
    config = stages[0].config  # the one that schedules read
    config.finalize_model_grads_func = finalize_model_grads
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return chunks


def wrap_for_inference(model: LanguageModule) -> torch.nn.Module:
    """Move a model to this rank's device, in its precision."""
    model = model.to(device())
    return (Float16Module(model.config, model) if model.config.bf16 else model).eval()


def await_weights(module: torch.nn.Module) -> None:
    """Call before weights are used without their module: with `overlap_param_gather` they may be on the way."""
    for wait in module._forward_pre_hooks.values():
        wait(module, ())


def unwrap(model: torch.nn.Module) -> Any:
    """The model under its Float16Module and DistributedDataParallel; the first of `ModelChunks`."""
    return unwrap_all(model)[0]


def unwrap_all(model: torch.nn.Module) -> list[Any]:
    """This rank's stages, each under its Float16Module and DistributedDataParallel."""
    stages: list[Any] = _chunks(model)
    while any(hasattr(stage, "module") for stage in stages):
        stages = [stage.module for stage in stages]
    return stages


def _chunks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model) if isinstance(model, ModelChunks) else [model]


def build_optimizer(model: ModelChunks, **settings: Any) -> Any:
    """Adam with fp32 main weights: Transformer Engine's, apex's or torch's, whichever is installed (in that order).

    Args:
        settings: `OptimizerConfig` fields (lr, weight_decay, adam_beta1, clip_grad, …).
    """
    first = next(iter(model))
    config, ddp_config = first.config, first.ddp_config
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=ddp_config.use_distributed_optimizer,
        overlap_param_gather=ddp_config.overlap_param_gather,
        **settings,
    )
    with _cuda_type_names():
        optimizer = get_megatron_optimizer(optimizer_config, list(model))
    config.grad_scale_func = optimizer.scale_loss
    _update_at_once(optimizer)
    _clip_at_once()
    mcore_optimizer.mend(optimizer)
    return optimizer


def _update_at_once(optimizer: Any) -> None:
    """Have torch's Adam update all tensors in one kernel, as those of apex and Transformer Engine do."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def _clip_at_once() -> None:
    """Have megatron-core's own clipping take all gradients at once and in place, as apex and Transformer Engine do.

    It would wait for the device at every tensor, and make a second copy of the gradients.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm_of_all
        clip_grads.multi_tensor_scale_impl = _scale_all


def _norm_of_all(chunk_size: int, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple:
    gradients = lists[0]
    norms = torch._foreach_norm(gradients) if gradients[0].is_cuda else [_norm_in_parts(x) for x in gradients]
    return torch.stack(norms).norm()[None], None


def _norm_in_parts(x: torch.Tensor) -> torch.Tensor:
    """On a CPU one fp32 sum over millions of squares loses digits: 0.2 % of the norm at 33 million."""
    flat = x.flatten()
    end = len(flat) // 4096 * 4096
    return torch.cat((torch.linalg.vector_norm(flat[:end].view(-1, 4096), dim=1), flat[end:])).norm()


def _scale_all(chunk_size: int, overflow: Any, lists: list[list[torch.Tensor]], scale: float) -> None:
    sources, targets = lists
    assert all(source is target for source, target in zip(sources, targets, strict=True))
    torch._foreach_mul_(targets, scale)


def gradient_norm(optimizer: Any) -> float:
    """Make the gradients of a backward pass ready for `update`; returns the whole model's norm.

    It waits for the device. A number that is not finite anywhere makes the norm so.
    """
    with _cuda_type_names():
        optimizer.prepare_grads()
        return float(optimizer.get_grad_norm())


def update(optimizer: Any, grad_norm: float) -> None:
    """Clip the gradients, whose norm is known, and update the weights with them."""
    with _cuda_type_names():
        for part in optimizer.chained_optimizers:
            if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grads.clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()


@torch.no_grad()
def all_finite(model: torch.nn.Module, optimizer: Any) -> bool:
    """Whether all weights and Adam's moments are finite numbers on every rank; every rank calls it."""
    if isinstance(model, ModelChunks):
        model.gather_weights()
    of_optimizer = (
        tensor
        for part in optimizer.chained_optimizers
        for parameter in part.get_parameters()
        for tensor in (parameter, *part.optimizer.state.get(parameter, {}).values())
    )
    finite = torch.ones((), device=device())
    for tensor in itertools.chain(model.parameters(), of_optimizer):
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            finite *= tensor.isfinite().all().to(finite.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def run_pipeline(
    forward_step: Callable,
    batches: Iterator,
    model: torch.nn.Module,
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list[Any]:
    """Forward (and backward) of all microbatches through the pipeline's stages.

    Args:
        model: with virtual stages `ModelChunks`; the microbatches are then a multiple of the pipeline's ranks.
        forward_step: (batches, model) -> (output, loss function), megatron-core's contract.
        seq_length: rows of the tensor that one stage hands to the next.

    Returns:
        The reports of the loss function, one a microbatch; empty before the last stage.
    """
    chunks = _chunks(model)
    if len(chunks) > 1:
        _check_interleaved(chunks[0].config)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(itertools.tee(batches, len(chunks))) if len(chunks) > 1 else batches,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def to_every_tensor_parallel_rank(x: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """x as the input of a product whose weight is divided over the tensor-parallel ranks; gradients are summed up.

    Under sequence parallelism each rank brings its part of the first axis.
    """
    if config.tensor_model_parallel_size == 1:
        return x
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x)
    return copy_to_tensor_model_parallel_region(x)


def _check_interleaved(config: Any) -> None:
    """Over gloo two settings give wrong gradients without a word in the interleaved schedule."""
    assert not config.batch_p2p_comm, "batched sends mix up what two ranks with two stages each exchange"
    assert not config.overlap_p2p_comm, "an output may be freed (deallocate_pipeline_outputs) before it is sent"


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., V / TP] of each tensor-parallel rank -> [..., V] on all of them."""
    return gather_from_tensor_model_parallel_region(logits)


# ---------------------------------------------------------------------------------------------- checkpoints


def save_state(model: torch.nn.Module, optimizer: Any | None, directory: str) -> None:
    """Write weights and, if given, optimizer state, sharded, into an empty directory; every rank calls it.

    Raises:
        UserError: some rank could not write, on every rank.
    """
    if isinstance(model, ModelChunks):
        model.gather_weights()
    state = _sharded_state(model, optimizer, is_loading=False)
    with _cuda_type_names(), mcore_writer.writing_here() as failures:
        dist_checkpointing.save(state, directory, content_metadata=_CHECKPOINT_FORMAT)

    def tell() -> None:
        for error in failures:
            raise UserError(
                f"{error.filename or directory} cannot be written ({error.strerror}); make room and run the same "
                "command again: it goes on from the checkpoint before this one"
            )

    distributed.together(tell)


def checkpoint_bytes(model: ModelChunks, optimizer: Any) -> int:
    """Bytes that `save_state` writes, of all ranks; every rank calls it.

    Each parameter is counted where it is stored: not by other data-parallel ranks, nor by tensor-parallel ranks that
    hold the same, nor by a last stage that shares the embedding.
    """
    group = parallel_state.get_data_parallel_group()
    first, chunks = dist.get_rank(group) == 0, list(model)
    is_fp32 = not chunks[0].config.bf16 and not chunks[0].ddp_config.use_distributed_optimizer
    copies = 2 if is_fp32 else 3  # Adam's two averages, and weights in fp32
    num_bytes = 0
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks) if first else ():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if (sharded or parallel_state.get_tensor_model_parallel_rank() == 0) and not getattr(
            parameter, "shared", False
        ):
            kept = copies if parameter.requires_grad else 0
            num_bytes += parameter.numel() * (parameter.element_size() + 4 * kept) + (1 + kept) * _BYTES_BESIDE
    total = torch.tensor(num_bytes, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return int(total)


def load_state(model: torch.nn.Module, optimizer: Any | None, directory: str) -> None:
    """Read what `save_state` wrote, at this run's layout; `optimizer` None loads weights only."""
    if optimizer is not None:
        mcore_optimizer.begin(optimizer)
    state = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), directory)
    for number, stage in enumerate(unwrap_all(model)):
        stage.load_state_dict(state[f"model{number}"])
    if optimizer is not None:
        with _cuda_type_names():
            optimizer.load_state_dict(state["optimizer"])
        mcore_optimizer.separate_steps(optimizer)
        _update_at_once(optimizer)  # whatever the run that saved did


class StoredWeights:
    """The weights that `save_state` wrote, each whole, in the layout of one rank, on the CPU.

    Attributes:
        shapes: by name.
    """

    def __init__(self, directory: str):
        self._reader = FileSystemReader(directory)
        stored = self._reader.read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self._entries = {name: entry for name, entry in tensors.items() if not name.startswith("optimizer.")}
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        state: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        torch.distributed.checkpoint.load(state, storage_reader=self._reader, no_dist=True)
        return state[name]


def _sharded_state(model: torch.nn.Module, optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**_CHECKPOINT_FORMAT, "dp_cp_group": group}
    stages = enumerate(unwrap_all(model))
    state = {f"model{number}": stage.sharded_state_dict(metadata=metadata) for number, stage in stages}
    if optimizer is not None:
        with _cuda_type_names():
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _cuda_type_names() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if has_gpu() else TypeNamesMode()
