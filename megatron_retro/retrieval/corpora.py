"""The task `tokenize`: from `--input` and `--data-path` to the tokenizer and the corpora of a work dir."""

import collections
import itertools
import pathlib
import tempfile
import time
from typing import Any

from megatron_retro import distributed
from megatron_retro.config.preprocessing import PreprocessConfig, settle
from megatron_retro.errors import UserError
from megatron_retro.retrieval import costs
from megatron_retro.retrieval.progress import Progress, say
from megatron_retro.storage import fingerprint, remove, write_atomically
from megatron_retro.workdir import Unfinished, WorkDir

TOKENIZER_SAMPLE_BYTES = 10_000_000
_TRAINED = "trained on the documents"


def check_sources(config: PreprocessConfig, work: WorkDir) -> None:
    """Refuse an `--input`, `--data-path` or `--tokenizer-model` that is not what the work dir was made from."""
    documents, settings = config.documents, work.settings
    if not (documents.input or documents.data_path or "sources" in settings):
        raise UserError("--input or --data-path is needed to begin a work dir: the documents to learn from")
    if (documents.input or documents.data_path) and "sources" in settings:
        given, recorded = describe(config), settings["sources"]
        if given != recorded:
            pairs = zip([*given, *[{}] * len(recorded)], [*recorded, *[{}] * len(given)], strict=False)
            ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"--input/--data-path is {_told(ours)}, but --retro-work-dir {work.path} was made from "
                f"{_told(theirs)}; leave the flag out, or build a new work dir"
            )
    project, recorded = config.documents.retro_project_dir, settings.get("retro_project_dir")
    if project and "sources" in settings and project != recorded:
        raise UserError(
            f"--retro-project-dir is {project}, but --retro-work-dir {work.path} was made "
            f"{f'from {recorded}' if recorded else 'without one'}; leave the flag out, or build a new work dir"
        )
    if config.tokenizer_paths() and "tokenizer" in settings:
        found = _tokenizer_print(config)
        if found != settings["tokenizer"]:
            raise UserError(
                f"{_tokenizer_flag(config)} is {found}, but --retro-work-dir {work.path} "
                f"was made with {settings['tokenizer']}; leave the flag out, or build a new work dir"
            )


def _told(source: dict[str, Any]) -> str:
    return f"{source['path']} ({source['fingerprint']}, weight {source['weight']:g})" if source else "nothing"


def _tokenizer_print(config: PreprocessConfig) -> str:
    from megatron_retro.data.tokenizer import tokenizer_file

    paths = [pathlib.Path(path) for path in config.tokenizer_paths()]
    if len(paths) == 1:
        return fingerprint(tokenizer_file(paths[0]))
    for flag, path in zip(("--vocab-file", "--merge-file"), paths, strict=False):
        if not path.is_file():
            raise UserError(f"{flag} {path}: no such file")
    return " ".join(map(fingerprint, paths)) or _TRAINED


def _tokenizer_flag(config: PreprocessConfig) -> str:
    """The tokenizer as it was given, for messages."""
    paths = config.tokenizer_paths()
    return f"--tokenizer-model {paths[0]}" if len(paths) == 1 else f"--vocab-file {paths[0]} --merge-file {paths[1]}"


def describe(config: PreprocessConfig) -> list[dict[str, Any]]:
    """What `--input` and `--data-path` name, a corpus each, in plain values."""
    from megatron_retro.data.documents import find_sources

    described = [
        {"name": source.name, "path": source.path, "fingerprint": source.fingerprint(), "weight": 0.0, "tokens": False}
        for source in find_sources(config.documents.input)
    ]
    for weight, prefix in weighted_prefixes(config.documents.data_path):
        described.append(
            {"name": pathlib.Path(prefix).name, "path": prefix, "fingerprint": "", "weight": weight, "tokens": True}
        )
    names = [source["name"] for source in described]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--input and --data-path name corpus {name!r} more than once; rename one")
    return described


def weighted_prefixes(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Megatron's two forms: `PREFIX …` (weight 0: by size) or `WEIGHT PREFIX WEIGHT PREFIX …`."""
    try:
        weights = [float(value) for value in values[::2]] if len(values) > 1 else []
    except ValueError:
        weights = []
    if not weights:
        return [(0.0, str(pathlib.Path(prefix).absolute())) for prefix in values]
    if len(values) % 2 or min(weights) <= 0:
        raise UserError(f"--data-path {' '.join(values)}: every prefix needs a weight above 0 before it, or none does")
    return [
        (weight, str(pathlib.Path(prefix).absolute())) for weight, prefix in zip(weights, values[1::2], strict=True)
    ]


def begin(work: WorkDir, config: PreprocessConfig, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The beginning of the task `tokenize`: settle what the work dir is made from, and its tokenizer.

    Args:
        known: name -> entry of corpora that stay as they are.

    Returns:
        `known`, and what else need not be made again.

    Raises:
        UserError: bad input, or not what the work dir was begun with.
    """
    entries = distributed.together(lambda: {**known, **_intact(work)})
    work.on_rank_0(lambda: _begin(work, config, entries))
    return entries


def _intact(work: WorkDir) -> dict[str, dict[str, Any]]:
    """name -> entry of the corpora that need not be made again, where some file of the tokens was damaged."""
    if work.has("corpus"):
        return {entry["name"]: entry for entry in work.facts("corpus")["corpora"]}
    entries = {}
    for entry in work.manifest["damaged"].get("corpus", {"facts": {"corpora": []}})["facts"]["corpora"]:
        if all(file.exists() for file in _files(work, entry)):
            entries[entry["name"]] = entry
        elif entry["prefix"] != f"corpus/{entry['name']}":
            raise UserError(
                f"--retro-work-dir {work.path}: {entry['prefix']} is damaged, and documents were purged from it, so it "
                "cannot be made again from its documents; restore it from a backup"
            )
    return entries


def _begin(work: WorkDir, config: PreprocessConfig, known: dict[str, dict[str, Any]]) -> None:
    settle(config, work, "tokenize")
    _settle_sources(work, config, known)
    if not work.has("tokenizer"):
        start = time.monotonic()
        _make_tokenizer(work, config)
        costs.note(work, "seconds", tokenizer=round(time.monotonic() - start, 1))


def tokenize(work: WorkDir, config: PreprocessConfig, known: dict[str, dict[str, Any]]) -> None:
    """The rest of the task `tokenize`: the corpora's `.bin/.idx`.

    Args:
        known: what `begin` returned.

    Raises:
        UserError: a bad record under `--strict`, or no document with text.
    """
    entries = dict(known)
    for source in work.settings["sources"]:
        if source["name"] not in entries:
            make = _use_in_place if source["tokens"] else _tokenize_documents
            entries[source["name"]] = make(work, source, config)
    if not work.has("corpus"):
        work.on_rank_0(lambda: _commit_corpus(work, [entries[source["name"]] for source in work.settings["sources"]]))


def _settle_sources(work: WorkDir, config: PreprocessConfig, known: dict[str, dict[str, Any]]) -> None:
    from megatron_retro.data.documents import Source

    if "sources" not in work.settings:
        work.settings["sources"] = describe(config)
        if config.documents.data_path and not config.tokenizer_paths():
            raise UserError(
                "--data-path needs --tokenizer-model, or --vocab-file and --merge-file: the tokenizer that made its "
                "tokens"
            )
        work.settings["tokenizer"] = _tokenizer_print(config)
        if config.documents.retro_project_dir:
            work.settings["retro_project_dir"] = config.documents.retro_project_dir
    for source in work.settings["sources"]:
        if source["name"] in known:
            continue
        found = "" if source["tokens"] else Source.find(source["path"]).fingerprint()
        if found != source["fingerprint"]:
            raise UserError(
                f"--input {source['path']} was {source['fingerprint']} when --retro-work-dir {work.path} was begun, "
                f"is now {found}; restore the files, or build a new work dir"
            )
        if not source["tokens"]:
            _check_texts(work, source, is_key_settled=bool(known))


def _check_texts(work: WorkDir, source: dict[str, Any], *, is_key_settled: bool) -> None:
    """Refuse an input of which no record, among the first thousand, has text.

    Args:
        is_key_settled: the work dir has documents already, under its `--json-key`.

    Raises:
        UserError: tells why, and which keys there are.
    """
    from megatron_retro.data.documents import BadRecord, JsonLine, Source

    key = work.settings["json_key"]
    reasons: collections.Counter[str] = collections.Counter()
    keys = ""
    for record in itertools.islice(Source.find(source["path"]).records(key), 1000):
        try:
            record.text(key)
            return
        except BadRecord as reason:
            reasons[str(reason)] += 1
        if isinstance(record, JsonLine) and not keys:
            keys = record.keys()
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "it holds no record"
    made_with = f", with which --retro-work-dir {work.path} was made" if is_key_settled else ""
    way_out = (
        f"rename one of them to {key!r}, or build a new work dir" if is_key_settled else "give --json-key one of them"
    )
    raise UserError(
        f"--input {source['path']}: no document has text under --json-key {key} ({why}){made_with}; "
        + (f"the first one has the keys {keys}, {way_out}" if keys else "give other documents")
    )


def _make_tokenizer(work: WorkDir, config: PreprocessConfig) -> None:
    from megatron_retro.data.tokenizer import Tokenizer, gpt2_json, tokenizer_file

    given = [pathlib.Path(path) for path in config.tokenizer_paths()]
    if not given and work.settings["tokenizer"] != _TRAINED:
        raise UserError(f"--retro-work-dir {work.path} has lost its tokenizer; give its flags again")
    file = tokenizer_file(given[0]) if len(given) == 1 else None
    content = file.read_bytes() if file else gpt2_json(*given) if given else _train_tokenizer(work)
    path = work.path / "tokenizer" / f"tokenizer{_suffix(file) if file else '.json' if given else '.model'}"
    with tempfile.TemporaryDirectory() as folder:  # nothing is written for a tokenizer that is refused
        (pathlib.Path(folder) / path.name).write_bytes(content)
        _check_tokenizer(work, Tokenizer.open(pathlib.Path(folder) / path.name))
    write_atomically(path, lambda file: file.write(content))
    work.commit("tokenizer", describe_tokenizer(path), [path])


def describe_tokenizer(path: pathlib.Path) -> dict[str, Any]:
    """What a work dir with this tokenizer records of it."""
    from megatron_retro.data.tokenizer import Tokenizer, tokenizer_file

    made = Tokenizer.open(path)
    name = f"tokenizer/tokenizer{_suffix(tokenizer_file(path))}"
    return {"file": name, "vocab_size": made.vocab_size, "eod": made.eod, "pad": made.pad}


def _suffix(path: pathlib.Path) -> str:
    return ".json" if path.suffix == ".json" else ".model"


def _check_tokenizer(work: WorkDir, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot have made the Megatron corpora."""
    from megatron_retro.data.chunks import Corpus
    from megatron_retro.data.tokenize import check_token_ids

    for source in work.settings["sources"]:
        if source["tokens"]:
            tokens = Corpus.open(source["name"], source["path"]).tokens
            check_token_ids(source["name"], tokens, tokenizer.vocab_size)


def _train_tokenizer(work: WorkDir) -> bytes:
    from megatron_retro.data import tokenizer
    from megatron_retro.data.documents import Source
    from megatron_retro.data.tokenize import sample_texts

    settings = work.settings

    def records() -> Any:
        sources = [Source.find(source["path"]) for source in settings["sources"]]
        with Progress(
            "sample for the tokenizer", sum(source.num_bytes for source in sources), "bytes of input"
        ) as progress:
            for source in sources:
                yield from source.records(settings["json_key"], progress.advance)

    texts = sample_texts(records(), settings["json_key"], settings["seed"], TOKENIZER_SAMPLE_BYTES)
    say(f"tokenizer: training on {len(texts):,} documents of {sum(map(len, texts)):,} characters")
    return tokenizer.train(texts, settings["vocab_size"])


def open_tokenizer(work: WorkDir) -> Any:
    from megatron_retro.data.tokenizer import Tokenizer

    return Tokenizer.open(work.path / work.facts("tokenizer")["file"])


def _use_in_place(work: WorkDir, source: dict[str, Any], config: PreprocessConfig) -> dict[str, Any]:
    """The corpus entry of a Megatron prefix."""
    from megatron_retro.data.chunks import Corpus

    def look() -> dict[str, Any]:
        corpus = Corpus.open(source["name"], source["path"])
        counts = {"documents": len(corpus.length), "tokens": int(corpus.length.sum()), "skipped": {}}
        return {"name": source["name"], "prefix": source["path"], "weight": source["weight"], **counts}

    return distributed.together(look)


def _tokenize_documents(work: WorkDir, source: dict[str, Any], config: PreprocessConfig) -> dict[str, Any]:
    """Tokenize one `--input` argument; the corpus entry."""
    from megatron_retro.data.tokenize import count_parts, merge_parts, token_dtype

    tokenizer = open_tokenizer(work)
    unfinished = distributed.together(lambda: work.unfinished("corpus"))
    strict = config.documents.strict
    parts = distributed.together(lambda: _write_parts(work, source, tokenizer, unfinished, strict=strict))
    entry = {"name": source["name"], "prefix": f"corpus/{source['name']}", "weight": source["weight"]}

    def merge() -> dict[str, Any]:
        if distributed.rank():
            return {}
        if not unfinished.has(*_files(work, entry)):
            merge_parts(parts, work.path / entry["prefix"], token_dtype(tokenizer.vocab_size))
            unfinished.note(*_files(work, entry))
        return count_parts(parts)

    return {**entry, **distributed.together(merge)}


def _write_parts(
    work: WorkDir, source: dict[str, Any], tokenizer: Any, unfinished: Unfinished, *, strict: bool
) -> list[pathlib.Path]:
    """Write this rank's parts; the prefixes of all."""
    from megatron_retro.data import documents
    from megatron_retro.data.tokenize import part_files, write_part

    parts, key = [], work.settings["json_key"]
    files = documents.Source.find(source["path"])
    with Progress(f"tokenize {source['name']}", files.num_bytes, "bytes of input") as progress:
        for number, block in enumerate(documents.blocks(files.records(key, progress.advance))):
            parts.append(_part(work, source["name"], number))
            files_of_part = part_files(parts[-1])
            if number % distributed.world_size() == distributed.rank() and not unfinished.has(*files_of_part):
                write_part(parts[-1], block, tokenizer, key, strict=strict)
                unfinished.note(*files_of_part)
    return parts


def _part(work: WorkDir, name: str, number: int) -> pathlib.Path:
    return work.path / "corpus" / f"{name}.parts" / f"{number:08d}"


def _files(work: WorkDir, entry: dict[str, Any]) -> list[pathlib.Path]:
    """A corpus's files."""
    return [pathlib.Path(f"{work.path / entry['prefix']}{suffix}") for suffix in (".bin", ".idx")]


def _commit_corpus(work: WorkDir, corpora: list[dict[str, Any]]) -> None:
    for corpus in corpora:
        if not corpus["documents"]:
            raise UserError(f"corpus {corpus['name']!r} has no document with text (skipped: {corpus['skipped']})")
    work.commit("corpus", {"corpora": corpora}, [file for corpus in corpora for file in _files(work, corpus)])
    remove_parts(work)


def remove_parts(work: WorkDir) -> None:
    """Remove the parts of merged corpora, if some are left (by one rank)."""
    for corpus in work.facts("corpus")["corpora"]:
        remove(work.path / "corpus" / f"{corpus['name']}.parts")
