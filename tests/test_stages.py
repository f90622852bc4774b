"""Which layers lie on which stage: Megatron's letters, and the planner against all partitions there are."""

import itertools

import pytest
from model_helpers import C, V, make_configs

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import TrainingParallelConfig, parse_layout
from megatron_retro.errors import UserError
from megatron_retro.mcore import PipelineParallelLayerLayout
from megatron_retro.model.flops import multiply_adds
from megatron_retro.model.stages import layer_costs, partition, plan_stages, rank_costs


def partitions(number: int, parts: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, number), parts - 1)
    return [tuple(end - begin for begin, end in itertools.pairwise((0, *cut, number))) for cut in cuts]


@pytest.mark.parametrize("costs", [[1.0] * 7, [1, 1, 9, 1, 3, 1, 3, 2], [5, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_dearest_part_is_the_cheapest_there_is(costs: list[float], parts: int) -> None:
    sizes = partition(costs, parts)
    assert len(sizes) == parts and min(sizes) > 0 and sum(sizes) == len(costs)
    best = min(max(rank_costs(costs, other, parts)) for other in partitions(len(costs), parts))
    assert max(rank_costs(costs, sizes, parts)) == pytest.approx(best)


def test_equal_layers_make_equal_stages() -> None:
    assert partition([1.0] * 12, 4) == (3, 3, 3, 3)


def test_costs_of_layers_are_those_of_the_model() -> None:
    model, retro = make_configs()
    costs, logits = layer_costs(model, retro, V, C)
    parts = multiply_adds(model, retro, vocab_size=V, chunk_length=C)
    assert sum(costs) + logits == pytest.approx(parts.total)
    assert costs[0] == costs[2] < costs[3] < costs[1]  # layers 2 and 4 read, layer 2 has the encoder
    assert costs[1] - costs[3] == pytest.approx(parts.encoder)


def plan(layers: str, parallel: TrainingParallelConfig) -> tuple[int, ...]:
    model = ModelConfig(num_layers=12, hidden_size=64, num_attention_heads=4)
    model.finish()
    retro = RetroConfig(retro_add_retriever=True, retro_layers=layers)
    retro.finish(model)
    parallel.finish(parallel.pipeline_model_parallel_size, model, retro)
    made = plan_stages(model, retro, parallel, vocab_size=1000, chunk_length=64)
    assert sum(made.layers) == 12 and made.dearest_over_mean >= 1
    assert [stage.count("decoder") for stage in made.layout] == list(made.layers)
    assert made.layout[0][0] == "embedding" and made.layout[-1][-1] == "loss"
    return made.layers


def test_stage_of_the_encoder_gets_fewer_layers() -> None:
    first, *_, last = plan("1,12", TrainingParallelConfig(pipeline_model_parallel_size=3))
    assert first < last
    first, *_, last = plan("11,12", TrainingParallelConfig(pipeline_model_parallel_size=3))
    assert last < first


def test_virtual_stages_share_out_by_ranks() -> None:
    """The rank that runs the encoder in one of its stages gets fewer layers in all of them together."""
    layers = plan("6", TrainingParallelConfig(1, 2, num_virtual_stages_per_pipeline_rank=2))
    ends = list(itertools.accumulate(layers))
    encoder = next(stage for stage, end in enumerate(ends) if end >= 6) % 2
    assert sum(layers[encoder::2]) < sum(layers[1 - encoder :: 2])


def test_layout_that_was_asked_for() -> None:
    parallel = TrainingParallelConfig(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="E|t*10|t|tL")
    assert plan("6,9", parallel) == (0, 10, 1, 1)
    assert parallel.virtual_stages == 2


@pytest.mark.parametrize("text", ["Ettt|tttt|ttL", "E|(t|)*3ttL", "Et*3,|(tt|)*2,L", "EtL"])
def test_letters_mean_what_they_mean_to_megatron_core(text: str) -> None:
    stages = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == tuple(sum(layer.name == "decoder" for layer in stage) for stage in stages)


@pytest.mark.parametrize("text", ["", "tt|tt", "Ett", "Ett||ttL", "Ett|mL", "ttE|L", "Ett|tt|", "EttLt", "E(t|L"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--pipeline-model-parallel-layout"):
        parse_layout(text)
