#!/usr/bin/env python
"""Check what README.md, CONTRIBUTING.md and docs/ tell a reader to type: flags, values, make targets, files, links.

python tools/check_docs.py [FILE.md …]

Every line of a ```bash block is read as a command. The arguments of pretrain_retro.py and of tools/*.py go through the
real parser of that program; nothing is run.
"""

import ast
import importlib
import inspect
import itertools
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from megatron_retro.config import flags
from megatron_retro.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN_PATH = re.compile(r"(?:docs|examples|megatron_retro|tests|tools)/[\w./-]*\w")


def main() -> None:
    given = [pathlib.Path(name) for name in sys.argv[1:]]
    files = given or [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    problems = [problem for file in files if file.exists() for problem in check_file(file)]
    print("\n".join(problems) or f"{sum(file.exists() for file in files)} files: all commands parse, all files exist")
    sys.exit(bool(problems))


def check_file(file: pathlib.Path) -> list[str]:
    """`name:line: what is wrong`, for each problem."""
    text = file.read_text(encoding="utf-8")
    found = [(line, problem) for line, command in commands(text) for problem in check_command(command)]
    found += [(line, problem) for line, problem in _missing_files(text, file.parent)]
    return [f"{file.name}:{line}: {problem}" for line, problem in found]


def commands(text: str) -> Iterator[tuple[int, str]]:
    """The commands of all ```bash blocks with the line each begins at; continued lines are joined."""
    block = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for match in block.finditer(text):
        first = text[: match.start(1)].count("\n") + 1
        start, command = first, ""
        for number, line in enumerate(match[1].splitlines(), start=first):
            command += line.removeprefix("$ ")
            if command.endswith("\\"):
                command = command[:-1] + " "
            else:
                yield start, command
                start, command = number + 1, ""


def check_command(command: str) -> list[str]:
    """What is wrong with a line of shell."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        return [f"not a shell command ({error}): {command}"]
    problems: list[str] = []
    for part in _split(words, ("&&", "||", "|", ";")):
        while part and re.fullmatch(r"\w+=.*", part[0]):  # NAME=value before the program
            part = part[1:]
        problems += _check_program(part) if part else []
    return problems


def _check_program(words: list[str]) -> list[str]:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        wanted = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
        return [f"make has no target {word}" for word in wanted if word not in targets]
    own = [word.split("::")[0] for word in words if OWN_PATH.match(word) and not word.startswith("docs/")]
    problems = [f"{word} does not exist" for word in own if not (ROOT / word).exists()]
    program = next((word for word in words if re.fullmatch(r"pretrain_retro\.py|tools/\w+\.py", word)), None)
    arguments = words[words.index(program) + 1 :] if program else []
    if words[0] == "sbatch":
        script = next((word for word in words if word.endswith(".sbatch")), "")
        program = {"pretrain": "pretrain_retro.py", "preprocess": "tools/preprocess_retro_data.py"}.get(
            pathlib.Path(script).stem
        )
        arguments = [*words[words.index(script) + 1 :], "--retro-work-dir", "set-by-the-script"] if program else []
    if program and not problems and "--help" not in arguments:
        problems += _check_arguments(program, arguments, _world_size(words))
    return problems


def _check_arguments(program: str, arguments: list[str], world_size: int | None) -> list[str]:
    config_class = config_class_of(ROOT / program)
    arguments = [word for word in arguments if word not in ("…", "...")]
    if config_class is None:
        return []
    try:
        config = flags.parse(config_class, _absolute_config(arguments))
        finish = getattr(config, "finish", None)
        if finish and world_size and "world_size" in inspect.signature(finish).parameters:
            finish(world_size)
    except UserError as error:
        return [f"{program}: {error}"]
    return []


def config_class_of(program: pathlib.Path) -> Any:
    """The configuration class that a program hands to `parse`; None where it parses by itself."""
    tree = ast.parse(program.read_text(encoding="utf-8"))
    modules = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_retro.config")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
            name = node.args[0].id
            if ast.unparse(node.func).split(".")[-1] == "parse" and name in modules:
                return getattr(importlib.import_module(modules[name] or ""), name)
    return None


def _absolute_config(arguments: list[str]) -> list[str]:
    """The arguments with `--config FILE` read from the repository's root."""
    return [str(ROOT / word) if before == "--config" else word for before, word in itertools.pairwise(["", *arguments])]


def _world_size(words: list[str]) -> int | None:
    """Ranks that a command starts; None where it leaves that to a variable or to SLURM, or only plans."""
    if "--dry-run" in words:
        return None
    if words[0].startswith("python"):
        return 1
    counts = {"--nproc-per-node": "1", "--nnodes": "1"}
    for name, value in itertools.pairwise(words):
        counts.update({name: value} if name in counts else {})
    values = list(counts.values())
    return int(values[0]) * int(values[1]) if words[0] == "torchrun" and all(v.isdigit() for v in values) else None


def _missing_files(text: str, directory: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Links to files that are not there, and `code` that is a path of this repository and is not there."""
    for number, line in enumerate(text.splitlines(), start=1):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", line):
            if "://" not in link and not link.startswith("mailto:") and not (directory / link).exists():
                yield number, f"the link {link} leads nowhere"
        for path in re.findall(r"`([^`]+)`", line):
            if OWN_PATH.fullmatch(path) and not (ROOT / path).exists():
                yield number, f"{path} does not exist"


def _split(words: list[str], separators: tuple[str, ...]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in separators:
            yield part
            part = []
        else:
            part.append(word)
    yield part


if __name__ == "__main__":
    main()
