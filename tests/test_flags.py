"""Flags: defaults < YAML < command line; every wrong one says what was meant."""

import dataclasses

import pytest

from megatron_retro.config.flags import at_least, flag, from_dict, parse, required, to_dict
from megatron_retro.config.preprocessing import TASKS, PreprocessConfig, split_weights
from megatron_retro.errors import UserError


@dataclasses.dataclass(frozen=True)
class First:
    """first group"""

    learning_rate: float = flag(1e-3, "a number")
    num_layers: int = flag(12, "a whole number")
    name: str | None = flag(None, "text")


@dataclasses.dataclass(frozen=True)
class Second:
    """second group"""

    kind: str = flag("a", "one of two", choices=("a", "b"))
    sizes: tuple[int, ...] = flag((1, 2), "several", many=True)
    is_on: bool = flag(False, "a switch")


@dataclasses.dataclass(frozen=True)
class Both:
    first: First
    second: Second


def test_command_line_wins_over_yaml_over_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("learning-rate: 1e-4\nnum_layers: 6\nsizes: [3, 4]\nis-on: true\n")
    config = parse(Both, ["--config", str(tmp_path / "a.yaml"), "--num-layers", "7"])
    assert config.first == First(learning_rate=1e-4, num_layers=7)
    assert config.second == Second(sizes=(3, 4), is_on=True)
    assert from_dict(Both, to_dict(config)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-layer", "3"], "unknown flag '--num-layer', did you mean --num-layers?"),
        (["--xyzzy"], r"unknown flag '--xyzzy' \(see --help\)"),
        (["--num-layers", "many"], "num-layers"),
        (["--kind", "c"], "'c'"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(Both, arguments)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("num_layer: 3", "unknown key 'num_layer', did you mean --num-layers?"),
        ("num_layers: 3.5", "--num-layers is 3.5; it takes a whole number"),
        ("is_on: 1", "--is-on is 1; it takes true or false"),
        ("kind: c", "--kind is 'c'; it takes one of 'a', 'b'"),
        ("kind: [a]", "--kind takes one value"),
        ("[1, 2]", "expected `flag: value` lines"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_wrong_yaml(tmp_path, yaml, message):
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(UserError, match=message):
        parse(Both, ["--config", str(tmp_path / "a.yaml")])


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read \(No such file"):
        parse(Both, ["--config", str(tmp_path / "none.yaml")])


def test_values_that_are_missing_or_too_small():
    required(First(name="a"), name="it takes a text")
    with pytest.raises(UserError, match=r"^--name is missing; it takes a text$"):
        required(First(), num_layers="it takes a number", name="it takes a text")
    at_least(12, First(), "num_layers", "name")  # one that is not given is filled in later
    with pytest.raises(UserError, match=r"^--num-layers is 12; it must be at least 13$"):
        at_least(13, First(), "name", "num_layers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--retro-work-dir is required"),
        (["--retro-work-dir", "w", "--retro-tasks", "embed,tokenize"], "the order is tokenize,db-build"),
        (["--retro-work-dir", "w", "--retro-tasks", "embed,embed"], "each once"),
        (["--retro-work-dir", "w", "--retro-tasks", "embedd"], "names 'embedd'"),
        (["--retro-work-dir", "w", "--split", "1,2"], "--split is '1,2'"),
        (["--retro-work-dir", "w", "--split", "0,1,1"], "train share above 0"),
        (["--retro-work-dir", "w", "--split", "nan,1,1"], "--split is 'nan,1,1'"),
        (["--retro-work-dir", "w", "--retro-chunk-length", "0"], "--retro-chunk-length is 0"),
        (["--retro-work-dir", "w", "--vocab-size", "-5"], "--vocab-size is -5"),
    ],
)
def test_wrong_preprocessing_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(PreprocessConfig, arguments)


def test_tasks_and_split():
    assert parse(PreprocessConfig, ["--retro-work-dir", "w"]).tasks() == TASKS
    some = parse(PreprocessConfig, ["--retro-work-dir", "w", "--retro-tasks", "tokenize, embed"])
    assert some.tasks() == ("tokenize", "embed")
    assert split_weights("98,1,1") == (98, 1, 1)
