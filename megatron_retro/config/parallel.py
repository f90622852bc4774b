"""Flags of parallelism that training alone has: interleaved and uneven pipelines, the distributed optimizer."""

import dataclasses
import re

from megatron_retro.config.flags import at_least, flag
from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.errors import UserError


@dataclasses.dataclass
class TrainingParallelConfig(ParallelConfig):
    """Parallelism and precision"""

    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "stages that each pipeline rank holds, taking turns (VPP)", show="1"
    )
    pipeline_model_parallel_layout: str | None = flag(
        None, 'stages in Megatron\'s letters, like "Ettt|tttt|ttL" (t: a layer)', show="balanced by their arithmetic"
    )
    context_parallel_size: int = flag(1, "1; RETRO does not shard one sample's attention over ranks")
    use_distributed_optimizer: bool = flag(False, "shard main weights and Adam's moments over the data-parallel ranks")
    overlap_grad_reduce: bool = flag(False, "sum gradients over data-parallel ranks while backward goes on")
    overlap_param_gather: bool = flag(
        False, "gather updated weights while forward goes on; needs --use-distributed-optimizer"
    )
    grad_reduce_in_bf16: bool = flag(False, "with --bf16: accumulate and sum gradients in bfloat16, not in fp32")
    recompute_granularity: str | None = flag(
        None,
        "save memory by computing again in the backward pass: selective (norms, activation functions) or full (layers)",
        choices=("selective", "full"),
    )

    def finish(self, world_size: int, model: ModelConfig, retro: RetroConfig | None) -> None:
        """As `ParallelConfig.finish`; fills in the number of virtual stages."""
        if self.context_parallel_size != 1:
            raise UserError(
                f"--context-parallel-size {self.context_parallel_size}: chunked cross-attention is not sharded over "
                "the ranks of a sequence; take 1, and --tensor-model-parallel-size with --sequence-parallel for long "
                "samples"
            )
        at_least(1, self, "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank")
        if self.pipeline_model_parallel_layout is not None:
            self._finish_layout(self.pipeline_model_parallel_layout, model)
        if self.num_virtual_stages_per_pipeline_rank is None:
            self.num_virtual_stages_per_pipeline_rank = 1
        if self.virtual_stages > 1 and self.pipeline_model_parallel_size == 1:
            raise UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.virtual_stages} needs --pipeline-model-parallel-size "
                "above 1"
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise UserError(
                "--overlap-param-gather needs --use-distributed-optimizer: without it no weights are gathered"
            )
        if self.grad_reduce_in_bf16 and not self.bf16:
            raise UserError("--grad-reduce-in-bf16 needs --bf16: in fp32 training gradients are fp32")
        super().finish(world_size, model, retro)

    @property
    def virtual_stages(self) -> int:
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def given_stage_layers(self) -> tuple[int, ...] | None:
        return parse_layout(self.pipeline_model_parallel_layout) if self.pipeline_model_parallel_layout else None

    def _finish_layout(self, text: str, model: ModelConfig) -> None:
        """Check the layout against the other flags; it says how many virtual stages there are."""
        layers, ranks = parse_layout(text), self.pipeline_model_parallel_size
        if len(layers) % ranks:
            raise UserError(
                f"--pipeline-model-parallel-layout {text} has {len(layers)} stages, no multiple of "
                f"--pipeline-model-parallel-size {ranks}"
            )
        if sum(layers) != model.num_layers:
            raise UserError(
                f"--pipeline-model-parallel-layout {text} has {sum(layers)} layers (t), --num-layers is "
                f"{model.num_layers}"
            )
        virtual = len(layers) // ranks
        if self.num_virtual_stages_per_pipeline_rank not in (None, virtual):
            raise UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_virtual_stages_per_pipeline_rank} differs from the "
                f"{virtual} of --pipeline-model-parallel-layout {text}; leave it out"
            )
        self.num_virtual_stages_per_pipeline_rank = virtual


def parse_layout(text: str) -> tuple[int, ...]:
    """Decoder layers of each stage of a layout as megatron-core writes it: `Et*3|(tt|)*2ttL` is `Ettt|tt|tt|ttL`.

    Raises:
        UserError: the text is no layout, or a stage holds nothing.
    """
    unrolled = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(pattern, lambda found: found[1] * int(found[2]), unrolled)
    if not re.fullmatch(r"E[t|]*L", unrolled) or "||" in unrolled:
        raise UserError(
            f"--pipeline-model-parallel-layout is {text!r}; it takes E (embedding), then layers t and | between "
            'stages, none empty, then L (loss), like "Ettt|tttt|ttL"'
        )
    return tuple(stage.count("t") for stage in unrolled.split("|"))
