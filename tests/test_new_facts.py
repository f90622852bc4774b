"""examples/new_facts at a small size: what a model answers follows the database, not its weights."""

import json
import pathlib
import sys

import pytest
from launch import ROOT, run_forked

sys.path.insert(0, str(ROOT / "examples" / "new_facts"))

import instruct
import run
import world

MODEL = f"--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length {(run.QUESTIONS + 1) * run.CHUNK}"
RETRO = "--retro-add-retriever --retro-layers 1,2 --retro-num-neighbors 1 --retro-encoder-layers 1"
TRAIN = "--micro-batch-size 8 --lr 1e-2 --lr-warmup-iters 20 --log-interval 50 --eval-iters 0"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attributes of four values, a model of two layers, programs that start quickly."""
    few = {name: world.ATTRIBUTES[name] for name in ("birthplace", "profession")}
    few = {name: (" ".join(values.split()[:4]), *sentences) for name, (values, *sentences) in few.items()}
    for module in (run, world, instruct):
        monkeypatch.setattr(module, "ATTRIBUTES", few)
    for name, flags in (("MODEL", MODEL), ("RETRO", RETRO), ("TRAIN", TRAIN)):
        monkeypatch.setattr(run, name, flags.split())

    def call(program: pathlib.Path, *flags: object, ranks: int = 1, log: object = None) -> None:
        run_forked("tests/limited.py", 0, program, *flags, ranks=ranks)  # which embeds without measuring first

    for module in (run, instruct):
        monkeypatch.setattr(module, "call", call)


def test_answers_follow_the_database(tmp_path: pathlib.Path, small: None) -> None:
    sizes = ["--people", "150", "--new-people", "40", "--train-iters", "180"]
    shares = run.main(["--output", str(tmp_path), *sizes])
    new, without, changed, old, removed, gpt = shares.values()
    assert new > 0.7 and changed > 0.7
    assert old < 0.2  # less than chance: they are known to be wrong now
    for share in (without, removed, gpt):
        assert share < 0.45  # chance is 0.25, four standard errors of 80 questions are 0.2
    assert "| chance | 25.0% |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.svg").read_text().count("<rect") == 1 + len(shares)


def test_a_tuned_model_answers_from_what_it_is_given(
    tmp_path: pathlib.Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People never seen: right with the text, chance (0.25) without and with one about somebody else."""
    for name, flags in (("MODEL", MODEL), ("TUNING", TRAIN)):
        monkeypatch.setattr(instruct, name, flags.split())
    everyone = world.people(1)
    old, new = world.facts(everyone[:150], 2), world.facts(everyone[150:200], 3)
    run.train_tokenizer(tmp_path, old, new)
    run.write(tmp_path / "statements.jsonl", (fact.stated() for fact in old))
    instruct.write_questions(tmp_path / "given.jsonl", old, 4, right=True)
    instruct.write_questions(tmp_path / "right.jsonl", new, 5, right=True)
    instruct.write_questions(tmp_path / "wrong.jsonl", new, 6, right=False)
    instruct.build(tmp_path, "--retro-tasks", "tokenize,db-build")  # what brings texts needs no index
    instruct.tune(tmp_path, "retro", RETRO.split(), 120, "given")
    right, wrong = (instruct.ask(tmp_path, name, "work") for name in ("right", "wrong"))
    assert right["on"]["exact_match"] >= 0.9 and right["on"]["f1"] >= 0.9
    assert right["off"]["exact_match"] < 0.42 and wrong["on"]["exact_match"] < 0.42  # four standard errors


def test_a_question_ends_with_its_chunk(tmp_path: pathlib.Path) -> None:
    known = world.facts(world.people(1)[:20], 2)
    tokenizer = run.train_tokenizer(tmp_path, known)
    documents = list(run.exams(known, tokenizer, 3))
    asked = {word for attribute in world.ATTRIBUTES.values() for word in attribute[2]}
    for document in documents[:-1]:
        tokens = tokenizer.encode([document])[0]
        assert len(tokens) == run.QUESTIONS * run.CHUNK + 2
        chunks = tokenizer.decode([tokens[at : at + run.CHUNK] for at in range(0, len(tokens), run.CHUNK)])
        assert all(chunk.endswith("?") for chunk in chunks[:-1])
        assert chunks[-1].split()[0] in {
            value for values, _, _ in world.ATTRIBUTES.values() for value in values.split()
        }
    assert len(asked) == 12


def test_values_change_and_nothing_else() -> None:
    known = world.facts(world.people(1)[:50], 2)
    after = world.changed(known, 3)
    assert all(old.value != new.value and old.asked() == new.asked() for old, new in zip(known, after, strict=True))
    assert json.dumps([fact.value for fact in world.changed(known, 3)]) == json.dumps([fact.value for fact in after])
