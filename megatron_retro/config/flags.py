"""Dataclasses as command lines: defaults < `--config file.yaml` < flags.

A program's configuration is a dataclass whose fields are group dataclasses; a group's docstring is its
title in `--help`, and each field made by `flag()` is one `--flag-name`. Flag names are unique over all groups.
"""

import argparse
import dataclasses
import difflib
import math
import pathlib
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_retro.errors import UserError
from megatron_retro.reading import read_text

Config = TypeVar("Config")


def flag(default: Any, help: str, *, choices: tuple[Any, ...] | None = None, many: bool = False, show: str = "") -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: value when neither YAML nor command line gives one; None means "filled in by `finish`".
        help: one line for `--help`.
        choices: the values allowed.
        many: takes one or more values; the field is then a tuple.
        show: what `--help` prints for a default that is filled in later.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, many=many, show=show))


def parse(
    config_class: type[Config],
    argv: list[str] | None = None,
    *,
    description: str = "",
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
) -> Config:
    """Parse `argv` (default `sys.argv[1:]`) into an instance of `config_class`.

    Args:
        complete: of the values that were given, those to take: with more that follow from them.

    Raises:
        UserError: an unknown flag or YAML key (the nearest known name is offered) or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(config_class, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_name(unknown[0], _flags(config_class), "flag", "see --help"))
    values = vars(namespace)
    file = values.pop("config", None)
    given = _read_yaml(file, config_class) if file else {}
    given.update(values)
    return from_dict(config_class, complete(given))


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build `config_class` from flat field values, checking each against its type and choices."""
    groups = {}
    known = _flags(config_class)
    for name in values:
        if name not in known:
            raise UserError(_unknown_name(name, known, "setting", "see --help"))
    for group_name, group_class in _groups(config_class).items():
        fields = [field for field in dataclasses.fields(group_class) if field.name in values]
        groups[group_name] = group_class(**{field.name: _checked(field, values[field.name]) for field in fields})
    return config_class(**groups)


def to_dict(config: Any) -> dict[str, Any]:
    """All flat field values of a configuration; `from_dict` is the inverse. Tuples become lists (JSON's form)."""
    flat = {}
    for group_name in _groups(type(config)):
        for name, value in dataclasses.asdict(getattr(config, group_name)).items():
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def flag_name(field_name: str) -> str:
    """`--flag-name`; `-k` where the name is one letter."""
    return ("--" if len(field_name) > 1 else "-") + field_name.replace("_", "-")


def required(group: Any, **way_out: str) -> None:
    """Refuse flags of a group that were not given; each comes with what to give.

    Raises:
        UserError: names the flag and what it takes.
    """
    for name, hint in way_out.items():
        if not getattr(group, name):
            raise UserError(f"{flag_name(name)} is missing; {hint}")


def at_least(least: int, group: Any, *names: str) -> None:
    """Refuse flags of a group that are given and too small.

    Raises:
        UserError: names the flag and both values.
    """
    for name in names:
        value = getattr(group, name)
        if value is not None and value < least:
            raise UserError(f"{flag_name(name)} is {value}; it must be at least {least}")


def check_timeout(minutes: float) -> None:
    """Refuse a --distributed-timeout-minutes that is no time.

    Raises:
        UserError: names the flag and the value.
    """
    if not 0 < minutes <= 7 * 24 * 60:
        raise UserError(f"--distributed-timeout-minutes is {minutes:g}; it lies above 0 and up to a week's 10080")


def _groups(config_class: type) -> dict[str, type]:
    return {field.name: typing.cast(type, field.type) for field in dataclasses.fields(config_class)}


def _flags(config_class: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for group in _groups(config_class).values() for field in dataclasses.fields(group)}


def _value_type(field: dataclasses.Field) -> type:
    """The type of one value: `int` for `int`, `int | None` and `tuple[int, ...]`."""
    annotation = field.type
    if isinstance(annotation, types.UnionType):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    return typing.cast(type, annotation)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def _parser(config_class: type, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    for group_class in _groups(config_class).values():
        group = parser.add_argument_group((group_class.__doc__ or "").strip().splitlines()[0])
        for field in dataclasses.fields(group_class):
            _add_flag(group, field)
    parser.add_argument("--config", metavar="FILE", help="YAML file of flag: value; the command line wins over it")
    return parser


def _add_flag(group: Any, field: dataclasses.Field) -> None:
    meta, value_type = field.metadata, _value_type(field)
    shown = meta["show"] or ("" if field.default in (None, False, ()) else field.default)
    text = (meta["help"] + (f" (default: {shown})" if shown != "" else "")).replace("%", "%%")
    if value_type is bool:
        group.add_argument(flag_name(field.name), action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = None if meta["choices"] else {int: "N", float: "X"}.get(value_type, "NAME")
    nargs = "+" if meta["many"] else None
    group.add_argument(
        flag_name(field.name), type=value_type, choices=meta["choices"], metavar=metavar, nargs=nargs, help=text
    )


def _checked(field: dataclasses.Field, value: Any) -> Any:
    if value is None and not isinstance(field.type, types.UnionType):
        raise UserError(f"{flag_name(field.name)} has no value; give one, or leave the flag out")
    if value is None or value == field.default:
        return field.default if isinstance(value, list) else value
    value_type, name = _value_type(field), flag_name(field.name)
    is_tuple = field.metadata["many"]
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not is_tuple and isinstance(value, (list, tuple)):
        raise UserError(f"{name} takes one value, not the list {value!r}")
    converted = tuple(_convert(name, value_type, item) for item in values)
    choices = field.metadata["choices"]
    for item in converted:
        if choices and item not in choices:
            raise UserError(f"{name} is {item!r}; it takes one of {', '.join(map(repr, choices))}")
    return converted if is_tuple else converted[0]


def _convert(name: str, value_type: type, value: Any) -> Any:
    """A YAML or JSON value as `value_type`; YAML reads `1e-4` as a string, so numbers pass through str."""
    if value_type is bool or isinstance(value, bool):
        if value_type is bool and isinstance(value, bool):
            return value
        raise UserError(f"{name} is {value!r}; it takes {'true or false' if value_type is bool else 'a value'}")
    try:
        if value_type is int and float(value) != int(float(value)):
            raise ValueError
        if value_type is float and math.isnan(float(value)):
            raise ValueError
        return value_type(float(value)) if value_type is int and not isinstance(value, int) else value_type(value)
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number"}.get(value_type, "text")
        raise UserError(f"{name} is {value!r}; it takes {kind}") from None


def _read_yaml(path: str, config_class: type) -> dict[str, Any]:
    import yaml

    text = read_text(f"--config {path}", pathlib.Path(path))
    try:
        _check_plain(text)
        values = yaml.safe_load(text) or {}
    except Exception as error:  # the constructors of YAML's types raise many kinds
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `flag: value` lines, found a {type(values).__name__}")
    known, given = _flags(config_class), {}
    for key, value in values.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in known:
            raise UserError(_unknown_name(str(key), known, "key", f"in --config {path}"))
        given[name] = value
    return given


def _check_plain(text: str) -> None:
    """Refuse what no flag needs and what a few bytes of YAML blow up or run with: tags, references, deep nesting.

    Raises:
        ValueError: names it.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1} holds" if event.start_mark else "it holds"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise ValueError(f"{where} a tag or reference; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            raise ValueError(f"{where} a list in a list; write `flag: value` lines")


def _unknown_name(name: str, known: dict[str, Any], kind: str, where: str) -> str:
    bare = name.split("=")[0].removeprefix("--").replace("-", "_")
    nearest = difflib.get_close_matches(bare, known, n=1)
    guess = f", did you mean {flag_name(nearest[0])}?" if nearest else ""
    return f"unknown {kind} {name.split('=')[0]!r}{guess} ({where})"
