"""Which layers lie on which pipeline stage: stages of about equal arithmetic.

Layers are not alike. The first RETRO layer brings the encoder, every RETRO layer cross-attention, and the last stage
has the output layer on top. Stages work at the pace of the dearest one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from megatron_retro.config.model import ModelConfig, ParallelConfig, RetroConfig
from megatron_retro.model.flops import multiply_adds


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Where the decoder's layers lie.

    Attributes:
        layers: number of layers of each of the PP × VP stages, in the model's order; stage s lies on rank s mod PP.
        costs: multiply-adds a token of each of the PP ranks.
    """

    layers: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def dearest_over_mean(self) -> float:
        """Cost of the dearest rank ÷ their mean."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    @property
    def layout(self) -> list[list[str]]:
        """What each stage holds, in megatron-core's words."""
        stages = [["decoder"] * number for number in self.layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        return stages


def plan_stages(
    model: ModelConfig, retro: RetroConfig | None, parallel: ParallelConfig, vocab_size: int, chunk_length: int
) -> StagePlan:
    """The layout that was asked for, or one whose dearest rank is cheap.

    Without virtual stages it is the cheapest there is. With them the PP × VP stages are balanced first, then sizes of
    two of them change by a layer for as long as that makes the ranks' sums better.
    """
    ranks = parallel.pipeline_model_parallel_size
    costs, logits = layer_costs(model, retro, vocab_size, chunk_length)
    layers = parallel.given_stage_layers
    if layers is None:
        with_logits = [*costs[:-1], costs[-1] + logits]
        layers = _level_ranks(with_logits, partition(with_logits, ranks * parallel.virtual_stages), ranks)
    sums = rank_costs(costs, layers, ranks)
    sums[-1] += logits
    return StagePlan(layers, tuple(sums))


def rank_costs(costs: Sequence[float], layers: tuple[int, ...], ranks: int) -> list[float]:
    """Cost of each rank's layers, where `layers` are the sizes of stages that lie on the ranks in turn."""
    ends = itertools.pairwise(itertools.accumulate(layers, initial=0))
    of_stage = [sum(costs[begin:end]) for begin, end in ends]
    return [sum(of_stage[rank::ranks]) for rank in range(ranks)]


def layer_costs(
    model: ModelConfig, retro: RetroConfig | None, vocab_size: int, chunk_length: int
) -> tuple[list[float], float]:
    """Multiply-adds a token of (each decoder layer with all that it runs, the output layer)."""
    parts = multiply_adds(model, retro, vocab_size=vocab_size, chunk_length=chunk_length)
    costs = [parts.decoder / model.num_layers] * model.num_layers
    for number in retro.layers if retro else ():
        costs[number - 1] += parts.cross_attention / len(retro.layers)  # type: ignore[union-attr]
    if retro:
        costs[min(retro.layers) - 1] += parts.encoder
    return costs, parts.logits


def partition(costs: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Sizes of `num_parts` contiguous parts, none empty, of which the dearest is as cheap as can be.

    Of several such partitions the one with the least sum of squares, so that the other parts are alike too.
    """
    ends = list(itertools.accumulate(costs, initial=0.0))
    dearest, _ = _cheapest(ends, num_parts, max)
    limit = dearest * (1 + 1e-9)
    _, sizes = _cheapest(ends, num_parts, lambda sum_, part: sum_ + part**2 if part <= limit else float("inf"))
    return sizes


def _level_ranks(costs: Sequence[float], layers: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Make a stage longer and another shorter while the dearest rank gets cheaper, or the ranks more alike."""

    def badness(layers: tuple[int, ...]) -> tuple[float, float]:
        sums = rank_costs(costs, layers, ranks)
        return max(sums), sum(cost**2 for cost in sums)

    while True:
        changed = [
            tuple(size + (stage == longer) - (stage == shorter) for stage, size in enumerate(layers))
            for longer, shorter in itertools.permutations(range(len(layers)), 2)
            if layers[shorter] > 1
        ]
        best = min(changed, key=badness, default=layers)
        if badness(best) >= badness(layers):
            return layers
        layers = best


def _cheapest(
    ends: Sequence[float], num_parts: int, add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """(cost, sizes) of the partition with the least cost, where `add` counts one part more."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # items placed -> (cost, sizes)
    for part in range(1, num_parts + 1):
        best = {
            end: min(
                (add(cost, ends[end] - ends[begin]), (*sizes, end - begin))
                for begin, (cost, sizes) in best.items()
                if begin < end
            )
            for end in range(part, len(ends))
        }
    return best[len(ends) - 1]
