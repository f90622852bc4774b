"""Instruction tuning: what is predicted, what reads what, that examples of a sample do not meet, and the program."""

import itertools
import json
import pathlib
import re
import shlex
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_forked
from model_helpers import C, K, R, V, in_double, make_model

from megatron_retro.config.model import QA_PROMPT
from megatron_retro.data.chunks import ChunkTable, Corpus
from megatron_retro.data.instructions import Examples, ExampleSource, InstructionSamples, packed
from megatron_retro.data.questions import Conversation, Turn, encoded, laid_out, read_conversations
from megatron_retro.data.samples import Batch
from megatron_retro.errors import UserError
from megatron_retro.training import bad_steps
from megatron_retro.training.instructions import weighted

L, PAD, EOD, FILL = 10, 2, 0, 1


class Letters:
    """A tokenizer of lower-case letters, spaces and line feeds."""

    vocab_size, eod, pad = V, EOD, PAD
    _letters = "\0\n .abcdefghijklmnopqrstuvwxyz?"

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self._letters.index(letter) for letter in text] for text in texts]


def conversations() -> list[Conversation]:
    """One with texts, one that asks the work dir, a short one with more texts than are read, one of three turns."""
    return [
        Conversation([Turn("where is it?", "in the north")], ["it north", "no", "a text that is longer than two"], 1),
        Conversation([Turn("a long question about nothing?", "x")], [], 2),
        Conversation([Turn("b?", "y")], ["one", "two", "three", "four", "five"], 4),
        Conversation([Turn("who?", "i"), Turn("why is that so?", "because"), Turn("so?", "yes")], [], 5),
    ]


def examples_of(given: list[Conversation], max_tokens: int = L * C) -> Examples:
    settings = dict(chunk_length=C, max_tokens=max_tokens, fill=FILL, num_neighbors=K)
    return Examples.of(given, Letters(), **settings)  # type: ignore[arg-type]


def samples_of(given: list[Conversation] | None = None, **changes: Any) -> InstructionSamples:
    """Neighbors of the work dir are chunks in order, from 1; one query has none."""
    examples = examples_of(given or conversations())
    length = np.array([4 * C + 2, 3 * C])
    tokens = np.random.default_rng(0).integers(3, V, length.sum()).astype(np.uint16)
    table = ChunkTable([Corpus("text", tokens, np.array([0, length[0]]), length, 1.0)], C)
    neighbors = (np.arange(len(examples.queries(C)) * 4).reshape(-1, 4) + 1) % table.num_chunks
    neighbors[1:2] = -1
    settings = dict(database=np.array([0, 1]), chunks_a_sample=L, seed=3, pad=PAD, num_neighbors=K)
    source = ExampleSource(pathlib.Path("a.jsonl"), examples, 0.0, neighbors, packed(examples.num_chunks(C), L))
    return InstructionSamples(table, [source], **{**settings, **changes})


def where_each_stands(samples: InstructionSamples) -> dict[int, tuple[int, int, int]]:
    """Example -> (sample, its first chunk, its number of chunks)."""
    places = {}
    for sample in range(samples.epoch_size):
        begin = 0
        for example in samples.examples(sample)[1].tolist():
            number = int(samples._sources[0].examples.num_chunks(C)[example])
            places[example] = sample, begin, number
            begin += number
    return places


# ------------------------------------------------------------------------------------------------ layout


def test_every_prompt_ends_with_a_chunk_and_answers_alone_are_predicted() -> None:
    samples = samples_of()
    batch = samples.batch(np.arange(samples.epoch_size))
    for example, (sample, begin, number) in where_each_stands(samples).items():
        inside = slice(begin * C, (begin + number) * C)
        tokens, predicted = batch.tokens_BxS[sample, inside], batch.loss_mask_BxS[sample, inside] > 0
        assert not predicted[-1]
        assert torch.equal(batch.labels_BxS[sample, inside][predicted], tokens[1:][predicted[:-1]])
        rows = []
        for place in torch.nonzero(predicted).flatten().tolist():
            if not (place and predicted[place - 1]):
                assert (place + 1) % C == 0, "an answer's first token is predicted from the end of a chunk"
                rows.append([])
            rows[-1].append(int(tokens[place + 1]))
        turns = conversations()[example].turns
        assert rows == [[*Letters().encode([f" {turn.answer}"])[0], EOD] for turn in turns]
        first = Letters().encode([turns[0].prompt])[0]
        filled = -len(first) % C
        assert tokens[: filled + len(first)].tolist() == [FILL] * filled + first
    behind = (batch.loss_mask_BxS == 0).flip(1).cumprod(1).flip(1).bool()
    assert set(batch.tokens_BxS[behind].tolist()) >= {PAD}
    assert batch.loss_mask_BxS.sum() == sum(len(t.answer) + 2 for c in conversations() for t in c.turns)


def test_all_chunks_read_but_an_examples_last() -> None:
    samples = samples_of()
    batch, examples = samples.batch(np.arange(samples.epoch_size)), samples._sources[0].examples
    row = 0
    for example, (sample, begin, number) in sorted(where_each_stands(samples).items()):
        texts = Letters().encode(conversations()[example].ctxs[:K])
        for chunk in range(begin, begin + number - 1):
            if texts:
                expected = [text[:R] for text in texts]
            else:
                ids = samples._sources[0].neighbors[row, :K]
                read, lengths = samples.table.tokens(ids, R, PAD)
                expected = [tokens[:length].tolist() for tokens, length in zip(read, lengths, strict=True)]
                row += 1
            lengths_K = batch.neighbor_lengths_BxLxK[sample, chunk].tolist()
            assert lengths_K == [len(tokens) for tokens in expected] + [0] * (K - len(expected))
            for k, tokens in enumerate(expected):
                assert batch.neighbor_tokens_BxLxKxR[sample, chunk, k, : len(tokens)].tolist() == tokens
        assert not batch.neighbor_lengths_BxLxK[sample, begin + number - 1].any()
    assert row == len(samples._sources[0].neighbors) and (batch.neighbor_lengths_BxLxK > 0).any()
    reads = (batch.neighbor_lengths_BxLxK > 0).any(-1).flatten().nonzero().flatten()
    assert batch.neighbor_chunks_M.tolist() == reads.tolist()
    assert examples.counts == {"cut contexts": 1, "left out": 2, "cut": 0}
    assert samples.batch(np.array([0]), "off").neighbor_tokens_BxLxKxR is None


def test_random_neighbors_stand_where_there_were_some_and_dropout_hides_all() -> None:
    everything = np.arange(samples_of().epoch_size)
    on, random = (samples_of().batch(everything, mode) for mode in ("on", "random"))
    assert torch.equal(on.neighbor_lengths_BxLxK > 0, random.neighbor_lengths_BxLxK > 0)
    assert not torch.equal(on.neighbor_tokens_BxLxKxR, random.neighbor_tokens_BxLxKxR)
    trained = samples_of(random_neighbor_prob=1.0).batch(everything)
    assert torch.equal(trained.neighbor_tokens_BxLxKxR, random.neighbor_tokens_BxLxKxR)
    assert not samples_of(retrieval_dropout=1.0).batch(everything).neighbor_lengths_BxLxK.any()


def test_too_long_examples_are_cut_or_left_out() -> None:
    examples = examples_of(conversations(), max_tokens=4 * C)
    assert examples.lines.tolist() == [1, 4, 5] and examples.counts["skipped"] == 1 and examples.counts["cut"] == 2
    assert examples.tokens.lengths.max() == 4 * C
    assert not len(examples_of(conversations()[1:2], max_tokens=C))


def test_packing_is_tight_and_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = np.random.default_rng(1).integers(1, 9, 200)
    bins = packed(sizes, 8)
    assert sorted(np.concatenate(bins).tolist()) == list(range(200))
    assert max(sizes[members].sum() for members in bins) <= 8
    assert len(bins) <= 1.1 * sizes.sum() / 8
    many = [Conversation([Turn("q" * (1 + 7 * (n % 4)), "a")], [], n) for n in range(60)]

    def order(seed: int, num_samples: int) -> list[list[int]]:
        samples = samples_of(many, seed=seed, num_samples=num_samples)
        return [samples.examples(number)[1].tolist() for number in range(num_samples)]

    epoch = samples_of(many).epoch_size
    long = order(1, 3 * epoch)
    assert order(1, epoch) == long[:epoch] and order(2, epoch) != long[:epoch]
    for number in range(3):
        assert sorted(itertools.chain(*long[number * epoch : (number + 1) * epoch])) == list(range(60))
    assert long[:epoch] != long[epoch : 2 * epoch]


def test_a_bad_step_names_the_lines_that_it_read() -> None:
    samples = samples_of()
    described = bad_steps._samples(samples, np.array([0, 1, 2, -1]), {0: (2.0, 1)})
    lines = [line for sample in described for line in sample["examples"]]
    assert sorted(lines) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "a.jsonl:5"]
    assert described[0]["loss"] == 2.0 and json.dumps(described)


def test_an_answer_has_the_tokens_that_a_model_would_write() -> None:
    class Joining(Letters):
        """Writes "?" and a space behind it as one token."""

        def encode(self, texts: list[str]) -> list[list[int]]:
            return super().encode([text.replace("? ", ".") for text in texts])

    (plain,) = encoded([Turn("a b", "c")], Letters())  # type: ignore[arg-type]
    assert plain == tuple(Letters().encode(["a b", " c"]))
    (behind_a_space,) = encoded([Turn("a b\n", "c")], Letters())  # type: ignore[arg-type]
    assert behind_a_space == tuple(Letters().encode(["a b\n", "c"]))
    (joined,) = encoded([Turn("a?", "c")], Joining())  # type: ignore[arg-type]
    assert joined == tuple(Letters().encode(["a?", " c"]))
    assert laid_out([([5], []), ([6] * C, [7])], C, FILL, EOD)[0] == [1] * (C - 1) + [5, 0] + [1] * (C - 1) + [
        6
    ] * C + [7, 0]


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(
    "variant", [{}, dict(position_embedding_type="learned_absolute", group_query_attention=True, num_query_groups=2)]
)
def test_an_examples_loss_is_the_same_alone_and_packed(variant: dict[str, Any]) -> None:
    model = in_double(make_model(**variant, max_position_embeddings=L * C + C))
    together = losses(model, samples_of())
    neighbors, first = samples_of()._sources[0].neighbors, 0
    for number, conversation in enumerate(conversations()):
        alone = samples_of([conversation])
        queries = len(alone._sources[0].neighbors)
        alone._sources[0].neighbors = neighbors[first : first + queries]
        first += queries
        batch = alone.batch(np.array([0]))
        assert batch.examples_BxS is None or batch.examples_BxS.max() == 0
        torch.testing.assert_close(losses(model, alone)[0], together[number], rtol=0, atol=1e-11)
    assert samples_of().epoch_size < len(conversations()), "nothing was packed"


def losses(model: torch.nn.Module, samples: InstructionSamples) -> dict[int, torch.Tensor]:
    """Example -> losses of its predicted tokens."""
    batch: Batch = samples.batch(np.arange(samples.epoch_size))
    _, losses_BxS = model(
        batch.tokens_BxS,
        batch.labels_BxS,
        batch.loss_mask_BxS.double(),
        examples_BxS=batch.examples_BxS,
        neighbor_tokens_BxLxKxR=batch.neighbor_tokens_BxLxKxR,
        neighbor_lengths_BxLxK=batch.neighbor_lengths_BxLxK,
        neighbor_chunks_M=batch.neighbor_chunks_M,
    )
    found = {}
    for example, (sample, begin, number) in where_each_stands(samples).items():
        inside = slice(begin * C, (begin + number) * C)
        found[example] = losses_BxS[sample, inside][batch.loss_mask_BxS[sample, inside] > 0]
    return found


# ------------------------------------------------------------------------------------------------ files


def test_both_forms_are_read(tmp_path: pathlib.Path) -> None:
    messages = [
        {"role": role, "content": content}
        for role, content in [("system", "Be brief."), ("user", "Who?"), ("assistant", "I"), ("user", "Why?")]
    ]
    lines = [
        {"question": "What?", "answers": ["This", "That"], "ctxs": [{"title": "t", "text": "x"}]},
        {"messages": [*messages, {"role": "assistant", "content": "So"}], "ctxs": ["y"]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8-sig")
    first, second = read_conversations("--sft-data", path, "Q: {question}\nA:")
    assert first == Conversation([Turn("Q: What?\nA:", "This")], ["t\nx"], 1)
    assert second.turns == [Turn("Be brief.\nQ: Who?\nA:", "I"), Turn("Q: Why?\nA:", "So")] and second.ctxs == ["y"]


USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
ROLES = ':2: the roles of "messages" are not'


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x"}, ":2: no key 'answers'"),
        ({"messages": [USER]}, ':2: "messages" do not end with an "assistant"'),
        ({"messages": [ASSISTANT, USER]}, ROLES),
        ({"messages": [USER, USER, ASSISTANT]}, ROLES),
        ({"messages": []}, ROLES),
        ({"messages": "x"}, ':2: "messages" is no list of objects'),
        ({"messages": [{"role": "user"}, ASSISTANT]}, ":2: no key 'content'"),
        ({"messages": [{"role": "user", "content": ["x"]}, ASSISTANT]}, ':2: the "content" of a message is no text'),
        ({"messages": [USER, ASSISTANT], "ctxs": {"a": 1}}, ':2: "ctxs" is no list'),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, ':2: the "content" of a message is empty'),
        ({"question": "x", "answers": [""]}, ':2: "answers" holds an empty text'),
        ({"messages": [USER, ASSISTANT], "ctxs": ["a", ""]}, ':2: "ctxs" holds an empty text'),
        ({"messages": [USER, ASSISTANT], "ctxs": [{"id": 3}]}, ':2: "ctxs" holds an empty text'),
        ([], ":2: it is no JSON object"),
    ],
)
def test_lines_that_cannot_be(tmp_path: pathlib.Path, record: object, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "answers": ["y"]}\n' + json.dumps(record))
    with pytest.raises(UserError, match=f"--sft-data {re.escape(str(path) + message)}"):
        read_conversations("--sft-data", path, QA_PROMPT)


@pytest.mark.parametrize(("name", "message"), [("", "is a directory"), ("a.jsonl.gz", "is compressed")])
def test_what_is_no_file_of_lines(tmp_path: pathlib.Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}; give a file of JSON lines"):
        read_conversations("--sft-data", tmp_path / name, QA_PROMPT)


def test_files_may_have_weights(tmp_path: pathlib.Path) -> None:
    a, b = (str(tmp_path / name) for name in "ab")
    pathlib.Path(a).touch(), pathlib.Path(b).touch()
    assert weighted("--sft-data", (a, b)) == [(0.0, pathlib.Path(a)), (0.0, pathlib.Path(b))]
    assert weighted("--sft-data", ("2", a, "0.5", b)) == [(2.0, pathlib.Path(a)), (0.5, pathlib.Path(b))]
    for wrong in ((a, "2", b), ("0", a), ("2",), ("c",), ("2", "c")):
        with pytest.raises(UserError, match="--sft-data"):
            weighted("--sft-data", wrong)
    for directory in ((str(tmp_path),), ("2", str(tmp_path))):
        with pytest.raises(UserError, match="is a directory; name its files"):
            weighted("--sft-data", directory)


# ------------------------------------------------------------------------------------------------ the program


def flags(work: pathlib.Path, folder: pathlib.Path, *more: object) -> list[object]:
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 256 --retro-layers 1,2 --lr 1e-2"
    batch = "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --log-interval 1 --eval-iters 1"
    data = ["--sft-data", folder / "train.jsonl", "--sft-valid-data", folder / "valid.jsonl"]
    start = ["pretrain_retro.py", "--retro-work-dir", work, "--retro-add-retriever"]
    return [*start, *shlex.split(f"{shape} {batch}"), *data, *more]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`train.jsonl` and `valid.jsonl`: some with texts, some without, some conversations of two turns."""
    folder, lines = tmp_path_factory.mktemp("files"), []
    for number in range(24):
        line: dict[str, Any] = {
            "question": f"What does function {number} return?" * (1 + number % 3),
            "answers": ["None"],
        }
        if number % 4 == 0:
            talk = [
                ("user", "Sort a list"),
                ("assistant", "sorted(x)"),
                ("user", "And back?"),
                ("assistant", "x[::-1]"),
            ]
            line = {"messages": [{"role": role, "content": content} for role, content in talk]}
        if number % 2:
            line["ctxs"] = [f"def function_{number}(): return {number}", "raise ValueError"]
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text("".join(lines[:7]))
    return folder


def metrics(save: pathlib.Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


def test_it_trains_and_goes_on_at_other_layouts(
    small_work: pathlib.Path, files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What the work dir has is asked for once, by all ranks; a resumed run is bit-equal, other layouts to rounding."""
    work, save = tmp_path / "work", tmp_path / "save"
    shutil.copytree(small_work, work)
    assert "TP 1 × PP 1 × DP 1" in run_forked(*flags(work, files, "--dry-run")) and not (work / "sft").exists()
    text = run_forked(*flags(work, files, "--save", save, "--save-interval", 2))
    assert "train.jsonl: 24 examples, 12 of them with ctxs" in text and "no evaluation" not in text
    found = {file: file.read_bytes() for file in (work / "sft").rglob("*.npy")}
    assert len(found) == 2
    next(iter(found)).unlink()
    for layout in ("", "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"):
        other = tmp_path / f"other{layout}"
        shutil.copytree(save / "iter_0000002", other / "iter_0000002")
        run_forked(*flags(work, files, "--load", other, "--save", other, *layout.split()), ranks=2 if layout else 1)
        for key in ("lm_loss", "grad_norm", "valid_loss_on", "valid_loss_off", "valid_loss_random"):
            expected = {number: value for number, value in metrics(save, key).items() if number > 2}
            assert expected and metrics(other, key) == (pytest.approx(expected, rel=1e-5) if layout else expected)
    assert {file: file.read_bytes() for file in (work / "sft").rglob("*.npy")} == found
