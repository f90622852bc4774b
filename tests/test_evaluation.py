"""The evaluation: sums that must agree, layouts that must agree, and what questions read."""

import collections
import json
import math
import pathlib
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRAINING, build
from launch import run_forked
from model_helpers import C, K, L, R, V, initialize, make_model
from test_generation import Library, lively_model

from megatron_retro import mcore
from megatron_retro.config.evaluation import EvaluateConfig
from megatron_retro.config.flags import parse
from megatron_retro.config.parallel import TrainingParallelConfig
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.questions import Question, filled, filler, read_questions
from megatron_retro.data.samples import Samples
from megatron_retro.errors import UserError
from megatron_retro.evaluation import answers
from megatron_retro.evaluation.bootstrap import estimate, ratio, resampled
from megatron_retro.evaluation.charts import apart, nice_ticks
from megatron_retro.evaluation.chunks import EvaluatedChunks, slot_chunks
from megatron_retro.evaluation.evaluate import evaluate
from megatron_retro.evaluation.harness import RetroRequests, register
from megatron_retro.evaluation.leakage import GRID, curve, database_runs, read_runs
from megatron_retro.evaluation.other import OtherDatabase
from megatron_retro.evaluation.questions import ask
from megatron_retro.evaluation.report import render
from megatron_retro.evaluation.scoring import Row, Scorer, windows
from megatron_retro.inference.loading import load_trained
from megatron_retro.inference.reader import GivenReader
from megatron_retro.inference.writer import Choice, Writer
from megatron_retro.model.model import RetroModel
from megatron_retro.retrieval.neighbors import NeighborTable
from megatron_retro.training.evaluation import sample_losses
from megatron_retro.workdir import WorkDir

# ------------------------------------------------------------------------------------------------ chunks and slots


class Neighbors:
    """The two chunks behind each one, over all documents."""

    num_neighbors = 2

    def __init__(self, num_chunks: int):
        self._num_chunks = num_chunks

    def ids(self, chunks: np.ndarray) -> np.ndarray:
        return (chunks[:, None] + 7 + np.arange(2)) % self._num_chunks


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Some documents of one to many chunks, all of them in the split."""
    draw = np.random.default_rng(4)
    length = draw.integers(1, 12 * C, size=19)
    tokens = draw.integers(3, V, size=length.sum()).astype(np.uint16)
    table = ChunkTable([Corpus("text", tokens, np.cumsum(length) - length, length, 0.0)], C)
    return Samples(
        table,
        split="train",
        split_weights=(1.0, 0.0, 0.0),
        corpus_weights=None,
        chunks_a_sample=L,
        seed=0,
        pad=0,
        keep_rest=True,
        neighbors=Neighbors(table.num_chunks),
        num_neighbors=2,
    )


def spelled(rows: list[list[int]]) -> list[str]:
    """Three tokens of four spell a byte of a three-byte character, so that chunks cut characters."""
    texts = []
    for row in rows:
        content = b"".join(bytes([(0xE2, 0x82, 0xAC)[place % 3]]) for place, _ in enumerate(row))
        texts.append(content.decode(errors="replace"))
    return texts


def test_every_token_counts_once_in_its_own_chunk(samples: Samples) -> None:
    model, done = make_model().eval(), list[int]()
    losses = sample_losses(
        model, samples, num_samples=len(samples), micro_batch_size=3, retrieval="on", progress=done.append
    )
    assert sum(done) == len(samples) and max(done) == 3
    expected: dict[int, float] = collections.defaultdict(float)
    for number in range(len(samples)):
        batch, chunks = samples.batch(np.array([number])), samples.chunks(number)
        with torch.no_grad():
            _, by_position = model(
                batch.tokens_BxS,
                batch.labels_BxS,
                order_BxS=batch.order_BxS,
                neighbor_tokens_BxLxKxR=batch.neighbor_tokens_BxLxKxR,
                neighbor_lengths_BxLxK=batch.neighbor_lengths_BxLxK,
            )
        for position in torch.nonzero(batch.loss_mask_BxS[0]).flatten().tolist():
            slot = (position + 1) // C
            expected[int(chunks[slot] if slot < L else chunks[-1] + 1)] += float(by_position[0, position])
    chunks = EvaluatedChunks.of(samples, losses.tokens, spelled)
    assert chunks.ids.tolist() == sorted(expected)
    np.testing.assert_allclose(chunks.sum(losses.loss), [expected[chunk] for chunk in chunks.ids], rtol=1e-5)
    assert losses.mean == pytest.approx(sum(expected.values()) / losses.tokens.sum())
    # All tokens but the first of each document are predicted.
    table = samples.table
    _, lengths = table.tokens(chunks.ids, C, 0)
    is_first = table.first_chunk[chunks.documents] == chunks.ids
    assert chunks.tokens.tolist() == (lengths - is_first).tolist()
    assert (slot_chunks(samples, len(samples))[chunks.rows < 0] >= -1).all()


def test_bytes_of_chunks_add_up_to_the_text(samples: Samples) -> None:
    tokens = sample_losses(make_model(), samples, num_samples=len(samples), micro_batch_size=4, retrieval="off").tokens
    chunks = EvaluatedChunks.of(samples, tokens, spelled)
    whole = 0
    for number in range(len(samples)):
        batch = samples.batch(np.array([number]), "off")
        predicted = batch.labels_BxS[batch.loss_mask_BxS > 0].tolist()
        whole += len(spelled([predicted])[0].encode())
    assert chunks.bytes.sum() == whole
    assert (np.abs(chunks.bytes - chunks.tokens) <= 8).all()  # a byte a token, but for the characters that are cut


# ------------------------------------------------------------------------------------------------ leakage


def test_runs_equal_a_loop_over_what_is_near_and_what_is_read(samples: Samples) -> None:
    table = samples.table
    text = [table.tokens(np.array([chunk]), 2 * C, 0) for chunk in range(table.num_chunks)]

    def run_of(chunk: int, near: list[list[int]]) -> int:
        own = text[chunk][0][0, : min(C, text[chunk][1][0])].tolist()
        parts = [own[i:j] for i in range(len(own)) for j in range(i + 1, len(own) + 1)]
        shared = [part for part in parts if any(part == o[i : i + len(part)] for o in near for i in range(len(o)))]
        return max(map(len, shared), default=0)

    chunks = np.arange(table.num_chunks)
    ids = Neighbors(table.num_chunks).ids(chunks)
    near = [[text[id][0][0, : text[id][1][0]].tolist() for id in row] for row in ids]
    assert database_runs(table, chunks, table, ids).tolist() == [run_of(int(c), near[c]) for c in chunks]
    assert (database_runs(table, chunks, table, chunks[:, None]) == [min(C, size[0]) for _, size in text]).all()

    slots = slot_chunks(samples, len(samples))
    runs = read_runs(samples, slots, np.arange(len(samples)))
    assert (runs[:, 0] == 0).all() and (runs[slots < 0] == 0).all()
    for number in range(len(samples)):
        batch = samples.batch(np.array([number]))
        assert batch.neighbor_tokens_BxLxKxR is not None and batch.neighbor_lengths_BxLxK is not None
        for slot in range(1, L + 1):
            if slots[number, slot] >= 0:
                read = zip(
                    batch.neighbor_tokens_BxLxKxR[0, slot - 1], batch.neighbor_lengths_BxLxK[0, slot - 1], strict=True
                )
                assert runs[number, slot] == run_of(int(slots[number, slot]), [t[:n].tolist() for t, n in read])


def test_curve_counts_the_chunks_up_to_each_share() -> None:
    runs, loss, size = np.array([0, 8, 9, 64]), np.array([1.0, 2.0, 3.0, 4.0]), np.array([10, 10, 10, 20])
    chunks = EvaluatedChunks(np.arange(4), np.array([0, 0, 1, 1]), size, size, np.arange(4)[:, None])
    made = curve(runs, 64, {"on": loss, "off": 2 * loss}, chunks)
    assert made["chunks"] == [2, 3, 3, 3, 3, 3, 3, 4] and made["share_of_bytes"][0] == pytest.approx(0.4)
    bits = [3 / 20, 6 / 30, 10 / 50]
    assert [made["bits_per_byte"]["on"][place] for place in (0, 1, 7)] == pytest.approx(np.array(bits) / math.log(2))
    assert made["versus_off"]["on"][7] == pytest.approx(-10 / 50 / math.log(2))
    empty = curve(np.full(4, 64), 64, {"on": loss, "off": loss}, chunks)
    assert empty["bits_per_byte"]["on"][0] is None and empty["versus_off_interval"]["on"][0] is None


# ------------------------------------------------------------------------------------------------ intervals


def test_documents_are_drawn_not_their_chunks() -> None:
    draw = np.random.default_rng(0)
    of_document = draw.normal(3, 1, size=40)
    groups = np.repeat(np.arange(40), 25)
    columns = {"loss": of_document[groups], "other": of_document[groups] - 0.5, "tokens": np.ones(1000)}
    sums = resampled(columns, groups)
    value, interval = estimate(ratio(sums["loss"], sums["tokens"]))
    assert value == pytest.approx(of_document.mean()) and interval is not None
    half = 1.96 * of_document.std() / math.sqrt(40)
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half, rel=0.1)
    paired, paired_interval = estimate(ratio(sums["loss"] - sums["other"], sums["tokens"]))
    assert paired_interval == pytest.approx([0.5, 0.5]) and paired == pytest.approx(0.5)
    assert estimate(ratio(*(resampled(columns, np.zeros(1000))[name] for name in ("loss", "tokens"))))[1] is None
    again = resampled(columns, groups)
    assert all((again[name] == sums[name]).all() for name in columns)


# ------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    ("answer", "expected", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("an  apple, a day", ["Apple day"], 1, 1),
        ("Paris", ["London", "paris."], 1, 1),
        ("in the city of Paris", ["Paris"], 0, 0.4),
        ("blue blue red", ["blue green"], 0, 0.4),
        ("1,000", ["1000"], 1, 1),
        ("theory", ["the ory"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_exact_match_and_f1(answer: str, expected: list[str], exact: float, f1: float) -> None:
    assert answers.exact_match(answer, expected) == exact
    assert answers.f1(answer, expected) == pytest.approx(f1)


class Letters:
    """A tokenizer of lower-case letters, spaces and line feeds."""

    vocab_size, eod, pad = V, 0, 0
    _letters = "\0\n .abcdefghijklmnopqrstuvwxyz?"

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self._letters.index(letter) for letter in text] for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return ["".join(self._letters[token] for token in row if token) for row in tokens]


def writer_of(reader: Any) -> Writer:
    settings = dict(chunk_length=C, context=8 * C, vocab_size=V, eod=0, pad=0, num_neighbors=K)
    return Writer(reading_model(), reader=reader, **settings)  # type: ignore[arg-type]


def reading_model() -> RetroModel:
    """To which neighbors matter more than anything else."""
    model = lively_model()
    for name, weight in model.named_parameters():
        if "cross_attention.linear_proj.weight" in name:
            weight.data *= 20
    return model


def first_letters(questions: list[Question], *, reads: bool) -> list[str]:
    tokenizer, writer = Letters(), writer_of(GivenReader([], K, R) if reads else None)

    def reader_of(question: Question) -> Any:
        return GivenReader(tokenizer.encode(question.ctxs), K, R) if reads else None

    settings = dict(template="{question}a", chunk_length=C, max_new_tokens=1, batch_size=4)
    done: list[int] = []
    found = ask(questions, writer, tokenizer, reader_of, progress=done.append, **settings)  # type: ignore[arg-type]
    assert sum(done) == len(questions)
    return found


def test_the_first_token_of_an_answer_reads_the_given_texts() -> None:
    texts = ["abc", "a longer text than is read", "zzzz", "quite other", "mmm nn"]
    asked = [Question(question, ["x"], [text]) for question in ("what", "when", "b c d e f") for text in texts]
    found = first_letters(asked, reads=True)
    for begin in range(0, len(asked), len(texts)):
        assert len(set(found[begin : begin + len(texts)])) > 1, "the texts make no difference"
    unread = first_letters(asked, reads=False)
    assert all(len(set(unread[begin : begin + len(texts)])) == 1 for begin in range(0, len(asked), len(texts)))
    assert found == [first_letters([question], reads=True)[0] for question in asked], "a batch answers otherwise"
    cut = [Question("what", ["x"], [text]) for text in ("abcdefghij", "abcdefghij and what is behind")]
    assert len(set(first_letters(cut, reads=True))) == 1
    beyond = [Question("what", ["x"], texts[:K] + more) for more in ([], ["one too many"])]
    assert len(set(first_letters(beyond, reads=True))) == 1


def test_questions_end_with_a_chunk() -> None:
    assert filler(Letters()) == 1  # type: ignore[arg-type]
    for count in range(1, 3 * C):
        tokens = filled([9] * count, C, 1)
        assert len(tokens) % C == 0 and tokens.count(9) == count and len(tokens) - count < C and tokens[-1] == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"\n \n", "holds no question"),
        (b'{"question": "x", "answers": ["y"]}\n{"question": "x"}', r":2: no key 'answers'"),
        (b'{"answers": ["y"]}', ":1: no key 'question'"),
        (b"[1]", ":1: it is no JSON object"),
        (b"what?", ":1: Expecting value"),
        (b'{"question": "", "answers": ["y"]}', '"question" is no text'),
        (b'{"question": "\\ud800", "answers": ["y"]}', ":1: .*surrogates not allowed"),
        (b'{"question": "x", "answers": []}', '"answers" is no list of texts'),
        (b'{"question": "x", "answers": "y"}', '"answers" is no list of texts'),
        (b'{"question": "x", "answers": ["y", " "]}', '"answers" holds an empty text'),
        (b'{"question": "x", "answers": ["y"], "ctxs": "z"}', '"ctxs" is no list'),
        (b'{"question": "x", "answers": ["y"], "ctxs": [3]}', '"ctxs" holds what is neither text nor'),
    ],
)
def test_question_files_that_cannot_be(tmp_path: pathlib.Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_a_hugging_face_directory_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"holds no checkpoint; tools/convert_checkpoint\.py makes one"):
        load_trained(str(tmp_path), TrainingParallelConfig())


# ------------------------------------------------------------------------------------------------ given tokens


def test_windows_score_each_token_once_with_what_fits_before_it() -> None:
    tokens = list(range(100))
    for context in (2 * C, 3 * C, 20 * C, 40 * C):
        for first in (C, 3 * C):
            rows = list(windows(tokens, first, context, C))
            assert [token for row in rows for token in row.tokens[row.first :]] == tokens[first:]
            assert all(len(row.tokens) <= context and row.first >= C and row.tokens[0] % C == 0 for row in rows)


@pytest.mark.parametrize("reads", [True, False], ids=["on", "off"])
def test_what_is_written_greedily_scores_as_greedy(reads: bool) -> None:
    """Writing keeps states, scoring reads everything at once; both must read the same neighbors at the same places."""
    initialize()
    library: Any = Library() if reads else None
    prompts, written = [[3] * C, [4, 5, 6, 7, 8] * 3], []
    for event in writer_of(library).write(prompts, Choice(temperature=0), 2 * C + 1):
        if event.token is not None:
            written.append((event.text, event.token))
    texts = [[token for number, token in written if number == text] for text in range(len(prompts))]
    scorer = Scorer(reading_model(), C, library, K, {0})
    rows = [Row(prompt + text, len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]
    found = scorer.score(rows)
    assert [greedy for _, greedy in found] == [True, True]
    for row, (score, _) in zip(rows, found, strict=True):
        parts = [scorer.score([Row(row.tokens[: end + 1], end)])[0][0] for end in range(row.first, len(row.tokens))]
        assert sum(parts) == pytest.approx(score, rel=1e-4)
    other = [Row([*row.tokens[:-1], (row.tokens[-1] + 1) % V], row.first) for row in rows]
    assert [greedy for _, greedy in scorer.score(other)] == [False, False]


# ------------------------------------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def models(
    trained: pathlib.Path, small_work: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """Directories of a RETRO's and a GPT's checkpoints."""
    gpt = tmp_path_factory.mktemp("gpt")
    run_forked("pretrain_retro.py", "--retro-work-dir", small_work, "--save", gpt, *TRAINING)
    return {"retro": trained, "gpt": gpt}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("questions") / "qa.jsonl"
    records = [
        {"question": "What is <b>abc</b>?", "answers": ["a module"], "ctxs": [{"title": "abc", "text": "A module."}]},
        {"question": "Who?", "answers": ["nobody", "no one"], "ctxs": ["Nobody did.", "No one", "not read any more"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def leave_world() -> None:
    if mcore.parallel_state.model_parallel_is_initialized():
        mcore.shut_down()


@pytest.fixture
def alone() -> Iterator[None]:
    """A program's work is done in this process, which other tests may have made a world of one."""
    leave_world()
    yield
    leave_world()


def config_of(models: dict[str, pathlib.Path], work: pathlib.Path, *more: object) -> EvaluateConfig:
    arguments = ["--load", models["retro"], "--retro-work-dir", work, *more]
    return parse(EvaluateConfig, [str(argument) for argument in arguments])


def everything(models: dict[str, pathlib.Path], work: pathlib.Path, questions: pathlib.Path) -> list[object]:
    """Flags of all that there is."""
    compared = ["--gpt", models["gpt"], "--also-db", work, "--retro-num-neighbors", 3]
    return [*compared, "--qa", questions, "--qa-max-new-tokens", 5, "--micro-batch-size", 3]


def alike(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return found == (pytest.approx(expected, rel=1e-4, abs=1e-5) if isinstance(expected, float) else expected)


def test_figures_agree_with_each_other_and_at_every_layout(
    models: dict[str, pathlib.Path],
    small_work: pathlib.Path,
    questions: pathlib.Path,
    tmp_path: pathlib.Path,
    alone: None,
) -> None:
    copy = shutil.copytree(small_work, tmp_path / "copy")
    flags = everything(models, copy, questions)
    report = tmp_path / "report.html"
    result = evaluate(config_of(models, small_work, *flags, "--report", report))

    modes, leakage = result["retrieval"], result["leakage"]
    assert list(modes) == ["on", "off", "random", "also", "gpt"]
    assert len({figures["loss"] for figures in modes.values()}) == 4
    assert len({(figures["tokens"], figures["chunks"]) for figures in modes.values()}) == 1
    # The other database holds the same chunks, and of a held-out document none is its own.
    assert modes["also"] == modes["on"]
    for name in ("database", "read"):
        own, also = leakage[name], leakage[f"also_{name}"]
        assert also["bits_per_byte"]["also"] == own["bits_per_byte"]["on"] and also["chunks"] == own["chunks"]
        assert also["versus_off_interval"]["also"] == own["versus_off_interval"]["on"]
    for mode, figures in modes.items():
        assert figures["loss"] * figures["tokens"] / math.log(2) / result["bytes"] == pytest.approx(
            figures["bits_per_byte"]
        )
        for other in ("off", "gpt"):
            if f"versus_{other}" in figures:
                assert figures[f"versus_{other}"] == pytest.approx(figures["loss"] - modes[other]["loss"])
                low, high = figures[f"versus_{other}_interval"]
                assert low <= figures[f"versus_{other}"] <= high
        if mode in leakage["database"]["bits_per_byte"]:
            for name in ("database", "read"):
                assert leakage[name]["bits_per_byte"][mode][-1] == pytest.approx(figures["bits_per_byte"])
                assert leakage[name]["chunks"][-1] == figures["chunks"]
                assert leakage[name]["chunks"] == sorted(leakage[name]["chunks"])
    assert "versus_gpt" in modes["on"] and "versus_off" not in modes["gpt"]
    assert [one["found"].keys() for one in result["questions"]["asked"]] == [{"on", "off", "gpt"}] * 2

    page = report.read_text(encoding="utf-8")
    assert "What is &lt;b&gt;abc&lt;/b&gt;?" in page and "<b>" not in page
    assert page.count("<svg") == 5 and "<script" not in page and "http:" not in page.replace("http-equiv", "")
    assert render(result) == page

    where = ["--load", models["retro"], "--retro-work-dir", small_work]
    output = tmp_path / "figures.json"
    for layout in ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""):
        more = [*flags, *layout.split(), "--output", output]
        shown = run_forked("tools/evaluate_retro.py", *where, *more, ranks=2)
        other = json.loads(output.read_text())
        for part in ("bytes", "retrieval", "leakage", "questions"):
            assert alike(other[part], json.loads(json.dumps(result[part]))), f"{part}, {layout or 'data parallel'}"
        assert shown.count("loss − off") == shown.count("exact match") == 1


def test_neighbors_are_read_up_to_the_number_asked_for(
    models: dict[str, pathlib.Path], small_work: pathlib.Path, alone: None
) -> None:
    losses = []
    for number in (2, 7):
        more = ["--retro-num-neighbors", number, "--max-samples", 2]
        losses.append(evaluate(config_of(models, small_work, *more))["retrieval"])
    assert losses[0]["on"]["loss"] != losses[1]["on"]["loss"] and losses[0]["off"] == losses[1]["off"]
    assert losses[0]["on"]["samples"] == 2


def test_questions_without_texts_find_their_own(
    models: dict[str, pathlib.Path], small_work: pathlib.Path, tmp_path: pathlib.Path, alone: None
) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text('{"question": "import json", "answers": ["x"]}\n')
    more = ["--split", "none", "--qa", file, "--qa-max-new-tokens", 70, "--qa-prompt", "{question}\n"]
    result = evaluate(config_of(models, small_work, *more))
    assert "retrieval" not in result
    found = result["questions"]["asked"][0]["found"]
    assert found["on"] != found["off"] and set(result["questions"]["modes"]) == {"on", "off"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--retro-num-neighbors 11", "--retro-num-neighbors 11 is more than the 10 that the work dir holds"),
        ("--also-db /nowhere", "--also-db /nowhere holds no manifest.json"),
        ("--gpt /nowhere", "--gpt /nowhere holds no checkpoint"),
        ("--gpt {retro}", "holds a RETRO, not a GPT"),
        ("--load {gpt} --also-db {work}", "--also-db .* is for a model that reads; .* is a GPT"),
        ("--load {gpt} --retro-num-neighbors 2", "--retro-num-neighbors 2 is for a model that reads"),
        ("--load /nowhere", "--load /nowhere holds no checkpoint"),
        ("--qa /nowhere", "--qa /nowhere cannot be read"),
        ("--report /proc/nowhere/report.html", "--report /proc/nowhere cannot be written to"),
        ("--seq-length 100", "--seq-length 100 is no multiple"),
        ("--data-path nothing", "--data-path: the work dir has no corpus 'nothing'; it has my_text_data"),
        ("--max-samples 0", "--max-samples is 0; it must be at least 1"),
        ("--qa-max-new-tokens 0", "--qa-max-new-tokens is 0"),
        ("--qa-prompt x", "--qa-prompt is 'x'; it must hold {{question}}"),
        ("--split none", "--split none evaluates no text, and there is no --qa"),
        ("--qa q --sequence-parallel", "--sequence-parallel"),
    ],
)
def test_what_does_not_fit_is_one_line(
    models: dict[str, pathlib.Path], small_work: pathlib.Path, alone: None, flags: str, message: str
) -> None:
    given = shlex.split(flags.format(**models, work=small_work))
    with pytest.raises(UserError, match=message.format()) as caught:
        evaluate(config_of(models, small_work, *given))
    assert "\n" not in str(caught.value)


def test_a_gpt_of_another_tokenizer_or_shorter_is_refused(
    models: dict[str, pathlib.Path], small_work: pathlib.Path, tmp_path: pathlib.Path, alone: None
) -> None:
    gpt = shutil.copytree(models["gpt"], tmp_path / "gpt")
    (file,) = gpt.glob("iter_*/run.json")
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "tokenizer_digest": "other"}))
    with pytest.raises(UserError, match=r"--gpt .* was trained with the tokenizer other, --retro-work-dir .* has "):
        evaluate(config_of(models, small_work, "--gpt", gpt))
    leave_world()
    file.write_text(json.dumps({**state, "config": {**state["config"], "position_embedding_type": "learned_absolute"}}))
    with pytest.raises(UserError, match=r"--seq-length 320 is more than the 256 positions that --gpt .* has learned"):
        evaluate(config_of(models, small_work, "--gpt", gpt, "--seq-length", 320))


@pytest.mark.parametrize("kind", ["bm25", "hybrid"])
def test_another_database_may_be_searched_by_words(
    small_work: pathlib.Path, small_input: pathlib.Path, tmp_path: pathlib.Path, kind: str
) -> None:
    """The text of held-out chunks finds in a copy what the copy's own task found for them."""
    shutil.copytree(small_work, tmp_path / "work")
    other = WorkDir(tmp_path / "work")
    other.settings["retro_retriever"] = kind
    del other.manifest["stages"]["neighbors"]
    other.write()
    shutil.rmtree(other.directory("neighbors"))
    build(other.path, "--retro-tasks", "query-neighbors")
    database = OtherDatabase.open(str(other.path), WorkDir(small_work))
    table = ChunkTable.open(other)
    chunks = table.chunks_of(table.documents_in("valid", (80, 10, 10)))
    assert (database.neighbors(table, chunks) == NeighborTable(WorkDir(other.path)).ids(chunks)).all()


@pytest.mark.parametrize(
    ("stage", "field", "message"),
    [
        ("tokenizer", "digest", "its tokenizer is other"),
        ("chunks", "chunk_length", "its chunk length is other"),
        ("embeddings", "weights", "its embedder is other"),
    ],
)
def test_another_database_must_be_alike(
    small_work: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stage: str, field: str, message: str
) -> None:
    work = WorkDir(small_work)
    record = work.manifest["stages"][stage]
    (record if field == "digest" else record["facts"])[field] = "other"
    monkeypatch.setattr(WorkDir, "verify", lambda self, stages: None)
    work, other = WorkDir(small_work), work
    monkeypatch.setattr("megatron_retro.evaluation.other.WorkDir", lambda path: other)
    with pytest.raises(UserError, match=rf"--also-db .*: {message}, that of --retro-work-dir .* is (?!other)"):
        OtherDatabase.open(str(small_work), work)


# ------------------------------------------------------------------------------------------------ the harness


@pytest.fixture
def requests(models: dict[str, pathlib.Path], small_work: pathlib.Path, alone: None) -> RetroRequests:
    return RetroRequests(str(models["retro"]), str(small_work), retrieval="random", batch_size=2)


def test_requests_of_the_harness(requests: RetroRequests) -> None:
    asked = [("import os", " and json"), ("import os ", "and json"), ("", "def main"), ("x = 1\n" * 300, "x")]
    found = requests.loglikelihood(asked)
    assert [len(one) for one in found] == [2] * 4 and all(score < 0 for score, _ in found)
    text = "import this\n" * 200
    (whole,), (short,) = requests.loglikelihood_rolling([(text,)]), requests.loglikelihood_rolling([(text[:12],)])
    assert whole < short < 0
    long, ended = requests.generate_until([("import", {"max_gen_toks": 20, "until": []})] * 2)
    assert long == ended and long
    (cut,) = requests.generate_until([("import", {"max_gen_toks": 20, "until": [long[3:6]]})])
    assert cut == long[: long.index(long[3:6])]
    with pytest.raises(UserError, match="retrieval=maybe"):
        RetroRequests("x", "y", retrieval="maybe")


def test_the_harness_knows_the_model(models: dict[str, pathlib.Path], small_work: pathlib.Path, alone: None) -> None:
    api = pytest.importorskip("lm_eval.api", reason="lm-eval is not installed")
    assert api
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    register()
    arguments = f"load={models['retro']},retro_work_dir={small_work},retrieval=off"
    model = get_model("retro").create_from_arg_string(arguments, {"batch_size": 2, "device": None})
    request = Instance("loglikelihood", {}, ("import", " os"), 0)
    assert model.loglikelihood([request]) == model.requests.loglikelihood([("import", " os")])


# ------------------------------------------------------------------------------------------------ drawings


def test_ticks_and_names() -> None:
    for low, high in ((0.64, 0.91), (-0.0031, 0.0), (3.0, 3.0), (12.0, 1200.0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)
    moved = apart({"a": 10.0, "b": 11.0, "c": 12.0, "d": 90.0}, 16)
    assert moved["d"] == 90 and min(np.diff(sorted(moved.values()))) >= 15.9
    assert len(GRID) == 8 and GRID[-1] == 1
