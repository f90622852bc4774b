"""One self-contained page with the evaluation: no script, no request, every text escaped."""

import html
import pathlib
from collections.abc import Sequence
from typing import Any

from megatron_retro import webpage
from megatron_retro.errors import UserError
from megatron_retro.evaluation import charts
from megatron_retro.evaluation.table import NAMES, interval
from megatron_retro.storage import write_atomically

_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")
_SHOWN_QUESTIONS = 50
_CURVES = {
    "database": (
        "Without what the database holds word for word",
        "r(C) is the longest run of tokens that a chunk shares with one of its nearest neighbors in the database or "
        "their continuations, over the chunk length. On the left only chunks count that share little.",
    ),
    "read": (
        "Without what can be copied",
        "The same, with r(C) measured against what the model reads while it predicts the chunk: the neighbors of the "
        "chunk before it.",
    ),
}
_CURVES |= {f"also_{name}": (f"{title}: the database of --also-db", text) for name, (title, text) in _CURVES.items()}


def write_report(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write the page; `result` is what `evaluate` returns.

    Raises:
        UserError: it cannot be written.
    """
    content = render(result).encode()
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"--report {path} cannot be written to ({error.strerror}); give another file") from None


def render(result: dict[str, Any]) -> str:
    """The page's HTML; the same result gives the same bytes."""
    modes = result.get("retrieval") or {}
    body = [_header(result), _losses(result) if modes else ""]
    body += [_curve(name, curve) for name, curve in (result.get("leakage") or {}).items()]
    body.append(_questions(result["questions"]) if result.get("questions") else "")
    body.append(_settings(result))
    return webpage.fill(_TEMPLATE, style=webpage.style(_TEMPLATE), body="\n".join(part for part in body if part))


# ------------------------------------------------------------------------------------------------ sections


def _header(result: dict[str, Any]) -> str:
    lead, modes = [], result.get("retrieval") or {}
    if "versus_off" in modes.get("on", {}):
        on = modes["on"]
        change = on["perplexity"] / modes["off"]["perplexity"] - 1
        lead.append(
            f"With its neighbors the model's perplexity is {on['perplexity']:,.4g}, without them "
            f"{modes['off']['perplexity']:,.4g}: {change:+.1%}."
        )
        bounds = on["versus_off_interval"]
        if bounds and bounds[0] <= 0 <= bounds[1]:
            lead.append("The interval of the difference holds zero.")
    if modes:
        any_mode = next(iter(modes.values()))
        lead.append(
            f"{any_mode['tokens']:,} predicted tokens in {any_mode['documents']:,} documents of the "
            f"{result['split']} split."
        )
    return (
        f'<header><p class="kicker">RETRO evaluation</p><h1>{_esc(pathlib.Path(result["checkpoint"]).parent.name)}, '
        f'iteration {result["iteration"]:,}</h1><p class="lead">{_esc(" ".join(lead))}</p></header>'
    )


def _losses(result: dict[str, Any]) -> str:
    modes = result["retrieval"]
    rows = []
    for mode, figures in modes.items():
        cells = [_with_interval(figures[key], figures[f"{key}_interval"], form) for key, form in _COLUMNS]
        rows.append([f'<span class="key {mode}"></span>{_esc(_LONG.get(mode, mode))}', *cells])
    compared = [
        (f"{NAMES.get(mode, mode)} − {NAMES.get(other, other)}", mode, figures[f"versus_{other}"], figures[key])
        for other in ("off", "gpt")
        for mode, figures in modes.items()
        if (key := f"versus_{other}_interval") in figures
    ]
    parts = [_table(["retrieval", "loss", "perplexity", "bits per byte"], rows)]
    if compared:
        parts.append(
            "<h3>Paired differences of loss</h3>"
            '<p class="soft">In nats a token, over the same tokens; left of zero is better.</p>'
            f"<figure>{charts.differences(compared)}</figure>"
        )
    return _section(
        "Loss",
        "Loss in nats a token. Under each figure its 95% interval; documents were drawn with replacement.",
        parts,
    )


_COLUMNS = (("loss", ".4f"), ("perplexity", ",.4g"), ("bits_per_byte", ".4f"))
_LONG = {"also": "on, database of --also-db", "gpt": "GPT", "random": "random neighbors"}


def _curve(name: str, curve: dict[str, Any]) -> str:
    title, text = _CURVES[name]
    modes = list(curve["bits_per_byte"])
    compared = [mode for mode in curve["versus_off"] if mode != "gpt"]
    head = ["r(C) ≤ α", "chunks", "of the bytes", *(NAMES.get(mode, mode) for mode in modes)]
    head += [f"{NAMES.get(mode, mode)} − off" for mode in compared]
    rows = []
    for row, alpha in enumerate(curve["alpha"]):
        cells = [f"{100 * alpha:g}%", f"{curve['chunks'][row]:,}", f"{curve['share_of_bytes'][row]:.0%}"]
        cells += [_number(curve["bits_per_byte"][mode][row], ".4f") for mode in modes]
        for mode in compared:
            bounds = curve["versus_off_interval"][mode][row]
            cells.append(_with_interval(curve["versus_off"][mode][row], bounds, "+.4f"))
        rows.append(cells)
    figure = f"<figure>{charts.lines(curve, {mode: NAMES.get(mode, mode) for mode in modes})}</figure>"
    return _section(title, text, [figure, f"<details><summary>Figures</summary>{_table(head, rows)}</details>"])


def _questions(result: dict[str, Any]) -> str:
    keys = ("exact_match", "f1")
    rows = [
        [_esc(NAMES.get(mode, mode)), *(_with_interval(figures[k], figures[f"{k}_interval"], ".1%") for k in keys)]
        for mode, figures in result["modes"].items()
    ]
    modes = list(result["modes"])
    asked = [
        [_esc(one["question"]), _esc(" / ".join(one["answers"])), *(_esc(one["found"][mode]) for mode in modes)]
        for one in result["asked"][:_SHOWN_QUESTIONS]
    ]
    head = ["question", "expected", *(NAMES.get(mode, mode) for mode in modes)]
    first = f"The first {len(asked)} of {result['count']:,}" if len(asked) < result["count"] else "All of them"
    parts = [
        _table(["retrieval", "exact match", "F1"], rows),
        f'<details class="texts"><summary>{first}</summary>{_table(head, asked)}</details>',
    ]
    return _section(
        "Questions",
        f"{result['count']:,} questions; under each figure its 95% interval, questions drawn with replacement.",
        parts,
    )


def _settings(result: dict[str, Any]) -> str:
    known = {key: result[key] for key in ("checkpoint", "gpt", "retro_work_dir") if result.get(key)}
    given = {key: value for key, value in result["settings"].items() if value not in (None, False) and key != "load"}
    rows = "".join(
        f"<dt>{_esc(key.replace('_', ' '))}</dt><dd>{_esc(str(value))}</dd>"
        for key, value in {**given, **known}.items()
    )
    return _section("Settings", "", [f"<dl>{rows}</dl>"])


# ------------------------------------------------------------------------------------------------ parts


def _section(title: str, text: str, parts: Sequence[str]) -> str:
    told = f'<p class="soft">{_esc(text)}</p>' if text else ""
    return f'<section class="panel"><h2>{_esc(title)}</h2>{told}{"".join(parts)}</section>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    """`head` is text, `rows` hold HTML."""
    names = "".join(f'<th scope="col">{_esc(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _with_interval(value: float | None, bounds: list[float] | None, form: str) -> str:
    return f"{_number(value, form)}<small>{interval(bounds, form)}</small>".replace("-", "−")


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else f"{value:{form}}"


def _esc(text: str) -> str:
    return html.escape(text)
