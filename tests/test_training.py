"""The training program from its command line: learns, resumes, changes layout, evaluates, refuses what does not fit."""

import json
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from launch import run, run_forked

from megatron_retro.config.flags import parse
from megatron_retro.config.training import PretrainConfig
from megatron_retro.data.chunks import ChunkTable
from megatron_retro.errors import UserError
from megatron_retro.storage import save_npy
from megatron_retro.training.data import TrainingData, check_split, corpus_weights
from megatron_retro.workdir import WorkDir

ITERATIONS, SAVED = 6, 3
SHAPE = shlex.split(
    "--num-layers 4 --hidden-size 64 --seq-length 128 --num-attention-heads 4 --hidden-dropout 0.1 "
    "--retro-layers 2,4 --retro-encoder-hidden-size 32 --retro-encoder-num-attention-heads 2"
)
BATCH = shlex.split("--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --log-interval 1 --eval-iters 1")


def flags(work: pathlib.Path, *more: object) -> list[object]:
    return [
        *("pretrain_retro.py", "--retro-work-dir", work, "--retro-add-retriever", *SHAPE, *BATCH),
        *("--train-iters", ITERATIONS, *more),
    ]


def metrics(save: pathlib.Path, key: str = "lm_loss") -> dict[int, float]:
    """Iteration -> figure; a later line of the same iteration wins."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def whole(small_work: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The --save directory of an uninterrupted run, with a checkpoint in the middle."""
    save = tmp_path_factory.mktemp("whole")
    run_forked(*flags(small_work, "--save", save, "--save-interval", SAVED, "--tensorboard-dir", save / "board"))
    return save


def from_the_middle(whole: pathlib.Path, save: pathlib.Path) -> pathlib.Path:
    """A --save directory as a run that died after its checkpoint would have left it."""
    name = f"iter_{SAVED:07d}"
    shutil.copytree(whole / name, save / name)
    (save / "latest_checkpointed_iteration.txt").write_text(f"{SAVED}\n")
    return save


def test_it_learns_and_logs(whole: pathlib.Path) -> None:
    losses = metrics(whole)
    assert sorted(losses) == list(range(1, ITERATIONS + 1))
    assert losses[ITERATIONS] < losses[1] - 0.2
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    keys = {"iteration", "lm_loss", "grad_norm", "learning_rate", "tokens_per_second", "consumed_samples"}
    assert keys <= set(lines[0])
    assert lines[0]["consumed_samples"] == 4
    for line in lines[:ITERATIONS]:
        assert_speed(line)
        assert line["communication_share"] < line["forward_backward_share"]  # alone there is nobody to wait for
    assert {"valid_loss_on", "valid_loss_off", "valid_loss_random"} <= set(lines[-1])
    assert any((whole / "board").iterdir())


def assert_speed(line: dict[str, float]) -> None:
    shares = [line[f"{phase}_share"] for phase in ("data", "forward_backward", "communication", "optimizer")]
    assert min(shares) >= 0 and sum(shares) <= 1
    assert line["forward_backward_share"] > 0 and line["optimizer_share"] > 0 and line["data_share"] > 0
    assert line["model_tflops_per_second"] > 0 and line["tokens_per_second"] > 0
    assert 0 < line["matmul_share"] < float("inf")


def test_resumed_at_the_same_layout_bit_equal(
    whole: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    save = from_the_middle(whole, tmp_path)
    run_forked(*flags(small_work, "--load", save, "--save", save, "--num-workers", 2))
    for key in ("lm_loss", "grad_norm", "learning_rate", "valid_loss_on"):
        expected = {number: value for number, value in metrics(whole, key).items() if number > SAVED}
        assert metrics(save, key) == expected


TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
STAGES = "--pipeline-model-parallel-size 2"
VIRTUAL = f"{STAGES} --num-virtual-stages-per-pipeline-rank 2"
UNEVEN = f"{STAGES} --pipeline-model-parallel-layout Et|tttL"
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


def test_resumed_at_other_layouts(small_work: pathlib.Path, tmp_path: pathlib.Path, no_dropout: pathlib.Path) -> None:
    """One update at each: what every layout saves, the next one loads."""
    save = from_the_middle(no_dropout, tmp_path)
    same = ["--hidden-dropout", 0, "--load", save, "--save", save, "--eval-interval", 1, "--exit-interval", 1]
    texts = [run_forked(*flags(small_work, *same, *layout.split()), ranks=2) for layout in (TENSOR, VIRTUAL)]
    evaluate = ["tools/evaluate_retro.py", "--load", save, "--retro-work-dir", small_work, "--max-samples", 4]
    run_forked(*evaluate, "--output", tmp_path / "loss.json")
    texts.append(run_forked(*flags(small_work, *same, *UNEVEN.split()), ranks=2))
    for key in ("lm_loss", "grad_norm", "valid_loss_on", "valid_loss_off"):
        expected = {number: value for number, value in metrics(no_dropout, key).items() if number > SAVED}
        assert metrics(save, key) == pytest.approx(expected, rel=1e-5)
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    for line in [line for line in lines if "lm_loss" in line]:
        assert_speed(line)
        assert line["communication_share"] > 0
    evaluated = json.loads((tmp_path / "loss.json").read_text())["retrieval"]["on"]["loss"]
    assert evaluated == pytest.approx(metrics(no_dropout, "valid_loss_on")[SAVED + 2], rel=1e-5)
    assert "stages of 1+1+1+1 layers, the dearest rank 1." in texts[1] and "MB between stages; " in texts[1]
    assert "stages of 1+3 layers" in texts[2] and "stages of" not in texts[0]


@pytest.fixture(scope="module")
def no_dropout(small_work: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An uninterrupted run of two data-parallel ranks without dropout (its masks differ between layouts)."""
    save = tmp_path_factory.mktemp("no_dropout")
    same = ["--hidden-dropout", 0, "--eval-interval", 1]
    run(*flags(small_work, *same, "--save", save, "--save-interval", SAVED), ranks=2)
    return save


def test_distributed_optimizer_resumed(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Bit-equal at the same layout; at others to the rounding of bfloat16."""
    whole, again, other = (tmp_path / name for name in ("whole", "again", "other"))
    same = ["--bf16", "--hidden-dropout", 0, "--eval-interval", 1, "--use-distributed-optimizer"]
    run_forked(*flags(small_work, *same, *SHARDED.split(), "--save", whole, "--save-interval", SAVED), ranks=2)
    from_the_middle(whole, again)
    run_forked(*flags(small_work, *same, *SHARDED.split(), "--load", again, "--save", again), ranks=2)
    from_the_middle(whole, other)
    for layout in (f"{VIRTUAL} --overlap-grad-reduce", SHARDED):
        one_update = ["--load", other, "--save", other, "--exit-interval", 1, *layout.split()]
        run_forked(*flags(small_work, *same, *one_update), ranks=2)
    for key, tolerance in {"lm_loss": 1e-3, "valid_loss_on": 1e-3, "grad_norm": 1e-2}.items():
        expected = {number: value for number, value in metrics(whole, key).items() if number > SAVED}
        assert metrics(again, key) == expected
        del expected[ITERATIONS]
        assert metrics(other, key) == pytest.approx(expected, rel=tolerance)


def test_optimizer_of_the_other_kind_is_refused(whole: pathlib.Path, small_work: pathlib.Path) -> None:
    line = refused(run_forked(*flags(small_work, "--load", whole, "--use-distributed-optimizer"), expect=2))
    assert "--use-distributed-optimizer is False in the checkpoint, True in this run" in line


def test_all_ranks_exit_after_the_same_step(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ["--train-iters", 100000, "--exit-duration-in-mins", 1e-6, "--eval-iters", 0, "--save", tmp_path]
    text = run_forked(*flags(small_work, *arguments), ranks=2)
    assert "exiting after iteration 1 as asked by --exit-duration-in-mins" in text
    assert sorted(metrics(tmp_path)) == [1]
    assert (tmp_path / "iter_0000001" / "run.json").exists()


def test_gpt_trains_on_the_same_samples(whole: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = [flag for flag in flags(small_work, "--save", tmp_path) if flag != "--retro-add-retriever"]
    text = run_forked(*arguments)
    assert "GPT" in text and "RETRO" not in text
    # Shared weights start equal and the samples are the same; the untrained encoder changes the loss only a little.
    assert metrics(tmp_path)[1] == pytest.approx(metrics(whole)[1], rel=0.02)
    assert metrics(tmp_path)[1] != metrics(whole)[1]
    assert "off" in run("tools/evaluate_retro.py", "--load", tmp_path, "--retro-work-dir", small_work)


def test_the_tutorial_command(small_work: pathlib.Path) -> None:
    """As a tutorial gives it; only updates, batch and, given once more, the sequence are cut, for time."""
    tutorial = (
        f"pretrain_retro.py --num-layers 12 --hidden-size 768 --retro-work-dir {small_work} --retro-add-retriever "
        "--seq-length 1024 --data-path my_text_data"
    )
    short = ["--seq-length", 128, "--train-iters", 1, "--micro-batch-size", 1, "--eval-iters", 0]
    text = run_forked(*tutorial.split(), *short)
    assert "RETRO (layers 6,9,12)" in text
    assert re.search(r"iteration 1/1  lm_loss \d", text)


def test_evaluation_is_the_same_at_every_layout(
    whole: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    results = []
    for number, (ranks, layout) in enumerate([(1, ""), (2, "--pipeline-model-parallel-size 2"), (2, "")]):
        output = tmp_path / f"{number}.json"
        more = ["--output", output, "--micro-batch-size", 3, *layout.split()]
        text = run_forked(
            "tools/evaluate_retro.py", "--load", whole, "--retro-work-dir", small_work, *more, ranks=ranks
        )
        results.append(json.loads(output.read_text()))
        assert all(mode in text for mode in ("on", "off", "random"))
    figures = results[0]["retrieval"]
    assert set(figures) == {"on", "off", "random"}
    assert len({mode["tokens"] for mode in figures.values()}) == 1
    assert len({mode["loss"] for mode in figures.values()}) == 3
    for mode in figures.values():
        assert mode["loss_interval"][0] <= mode["loss"] <= mode["loss_interval"][1]
        assert mode["perplexity"] == pytest.approx(np.exp(mode["loss"]))
        nats_a_byte = mode["loss"] * mode["tokens"] / results[0]["bytes"]
        assert mode["bits_per_byte"] == pytest.approx(nats_a_byte / np.log(2))
    for other in results[1:]:
        for mode, values in figures.items():
            assert other["retrieval"][mode]["loss"] == pytest.approx(values["loss"], rel=1e-5)
    text_bytes = evaluated_bytes(small_work)
    assert results[0]["bytes"] == pytest.approx(text_bytes, rel=0.02)


def evaluated_bytes(work_dir: pathlib.Path) -> int:
    """UTF-8 bytes of the valid split, the documents' first tokens included."""
    data = TrainingData.open(str(work_dir), retrieve=False)
    table = data.table
    texts = []
    for document in table.documents_in("valid", data.split_weights):
        chunks = np.arange(table.first_chunk[document], table.first_chunk[document + 1])
        tokens, lengths = table.tokens(chunks, table.chunk_length, data.pad)
        row = [token for row, length in zip(tokens, lengths, strict=True) for token in row[:length].tolist()]
        texts += data.open_tokenizer().decode([row])
    return sum(len(text.encode()) for text in texts)


# ---- what does not fit is refused: one line, both values, exit code 2


def refused(text: str) -> str:
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def test_a_checkpoint_of_another_shape_is_refused(whole: pathlib.Path, small_work: pathlib.Path) -> None:
    line = refused(run_forked(*flags(small_work, "--load", whole, "--hidden-size", 96), expect=2))
    assert "--hidden-size is 64 in the checkpoint, 96 in this run" in line


def test_bad_layout_ends_every_rank_with_one_line(small_work: pathlib.Path) -> None:
    text = run(*flags(small_work, "--tensor-model-parallel-size", 3), ranks=2, expect=1)  # torchrun's own code is 1
    assert text.count(": error: ") == 1
    assert "--tensor-model-parallel-size 3" in text and "2 ranks" in text
    assert len(re.findall(r"exitcode\s+: 2", text)) >= 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--train-iters", 0),
        ("--lr", -1.0),
        ("--clip-grad", -1.0),
        ("--adam-beta2", 1.0),
        ("--hidden-dropout", 1.0),
        ("--micro-batch-size", 0),
        ("--global-batch-size", 3),
        ("--eval-iters", -1),
        ("--retro-retrieval-dropout", 1.5),
        ("--retro-layers", "5"),
        ("--pipeline-model-parallel-size", 2),
        ("--num-attention-heads", 5),
        ("--context-parallel-size", 2),
        ("--num-virtual-stages-per-pipeline-rank", 2),
        ("--overlap-param-gather", None),
        ("--grad-reduce-in-bf16", None),
        ("--pipeline-model-parallel-layout", "EttttL|"),
        ("--pipeline-model-parallel-layout", "Ett||ttL"),
        ("--pipeline-model-parallel-layout", "Ettt|ttL"),
    ],
)
def test_values_out_of_range_name_their_flag(flag: str, value: object) -> None:
    config = parse(
        PretrainConfig,
        [
            "--retro-work-dir",
            "x",
            "--num-layers",
            "4",
            "--hidden-size",
            "64",
            flag,
            *([] if value is None else [str(value)]),
        ],
    )
    with pytest.raises(UserError, match=flag):
        config.finish(world_size=2 if "pipeline" not in flag else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("5", "--pipeline-model-parallel-size 5 makes more stages than --num-layers 4"),
        ("2 --num-virtual-stages-per-pipeline-rank 3", "--num-virtual-stages-per-pipeline-rank 3 makes more stages"),
        ("2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12", "makes 3 micro-batches"),
        (
            "2 --pipeline-model-parallel-layout Et|tt|tL",
            "has 3 stages, no multiple of --pipeline-model-parallel-size 2",
        ),
        (
            "2 --pipeline-model-parallel-layout Ett|ttL --num-virtual-stages-per-pipeline-rank 2",
            "differs from the 1 of",
        ),
    ],
)
def test_pipelines_that_do_not_fit(arguments: str, message: str) -> None:
    shape = "--retro-work-dir x --num-layers 4 --hidden-size 64 --pipeline-model-parallel-size"
    config = parse(PretrainConfig, f"{shape} {arguments}".split())
    with pytest.raises(UserError, match=re.escape(message)):
        config.finish(world_size=config.parallel.pipeline_model_parallel_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retro-work-dir", "/nowhere"], "--retro-work-dir /nowhere holds no manifest.json"),
        (["--seq-length", 100], "--seq-length 100 is no multiple of the work dir's chunk length 64"),
        (["--data-path", "other"], "no corpus 'other'; it has my_text_data"),
        (["--split", "50,25,25"], "--split 50,25,25 differs from the work dir's 80,10,10"),
        (["--retro-num-neighbors", 11], "--retro-num-neighbors 11 is more than the 10 that the work dir holds"),
        (["--save", "/proc/nowhere"], "--save /proc/nowhere cannot be written to"),
    ],
)
def test_flags_that_do_not_fit_the_work_dir(small_work: pathlib.Path, arguments: list, message: str) -> None:
    assert message in refused(run_forked(*flags(small_work, *arguments), expect=2))


def test_an_exchanged_work_dir_is_refused(small_work: pathlib.Path, tmp_path: pathlib.Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(small_work, work)
    file = next((work / "neighbors").rglob("*.ids.npy"))
    save_npy(file, np.load(file)[::-1].copy())
    with pytest.raises(UserError, match=rf"file neighbors/.*{file.name} was .* is now "):
        TrainingData.open(str(work), retrieve=True)
    TrainingData.open(str(work), retrieve=False)  # a GPT reads no neighbors


def test_data_path_forms(small_work: pathlib.Path) -> None:
    table = ChunkTable.open(WorkDir(small_work))
    assert corpus_weights(table, ("/some/where/my_text_data",)) == {"my_text_data": 0.0}
    assert corpus_weights(table, ("0.5", "my_text_data")) == {"my_text_data": 0.5}
    for wrong in (("my_text_data", "my_text_data"), ("-1", "my_text_data"), ("1",)):
        with pytest.raises(UserError, match="--data-path"):
            corpus_weights(table, wrong)
    check_split("80,10,10", (80.0, 10.0, 10.0))
    assert os.path.exists(small_work)


def test_a_used_save_directory_is_gone_on_with_or_refused(
    whole: pathlib.Path, small_work: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """At half the batch and another learning rate: what is left is read, and flags win over the checkpoint."""
    save = from_the_middle(whole, tmp_path)
    (save / "iter_0000002.partial").mkdir()
    assert f"--save {save} holds checkpoints of another run, up to iter_0000003; give --load" in refused(
        run_forked(*flags(small_work, "--save", save), expect=2)
    )
    assert not (save / "metrics.jsonl").exists()
    same = ["--load", save, "--save", save, "--global-batch-size", 2, "--lr", 1e-3, "--lr-decay-style", "constant"]
    run_forked(*flags(small_work, *same, "--train-iters", 8))
    assert metrics(save, "learning_rate") == {number: 1e-3 for number in range(4, 9)}
    assert metrics(save, "consumed_samples")[8] == 4 * SAVED + 2 * 5
    assert not (save / "iter_0000002.partial").exists()
