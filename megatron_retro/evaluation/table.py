"""The evaluation on a terminal."""

from typing import Any

NAMES = {"also": "also-db", "gpt": "GPT"}


def table(result: dict[str, Any]) -> str:
    """The figures as people read them."""
    parts = []
    if result.get("retrieval"):
        parts.append(_losses(result))
        parts += [
            line for name in ("database", "also_database") if (line := _leakage(result["leakage"].get(name), name))
        ]
    if result.get("questions"):
        parts.append(_questions(result["questions"]))
    return "\n\n".join(parts)


def _losses(result: dict[str, Any]) -> str:
    modes = result["retrieval"]
    any_mode = next(iter(modes.values()))
    against_gpt = any("versus_gpt" in figures for figures in modes.values())
    lines = [
        f"{result['split']} split, {any_mode['samples']:,} samples of {any_mode['documents']:,} documents, "
        f"{any_mode['tokens']:,} predicted tokens, {result['bytes']:,} bytes; checkpoint {result['checkpoint']}",
        f"{'retrieval':<10} {'loss':>8}  {'95 % interval':<18} {'perplexity':>10} {'bits/byte':>10}  "
        f"{'loss − off':<28}" + ("loss − GPT" if against_gpt else ""),
    ]
    for mode, figures in modes.items():
        line = (
            f"{NAMES.get(mode, mode):<10} {figures['loss']:>8.4f}  {interval(figures['loss_interval']):<18} "
            f"{figures['perplexity']:>10.3f} {figures['bits_per_byte']:>10.4f}  {_versus(figures, 'off'):<28}"
        )
        lines.append((line + _versus(figures, "gpt")).rstrip())
    return "\n".join(lines)


def _versus(figures: dict[str, Any], other: str) -> str:
    if f"versus_{other}" not in figures:
        return ""
    return f"{figures[f'versus_{other}']:+.4f} {_signed(figures[f'versus_{other}_interval'])}"


def _leakage(curve: dict[str, Any] | None, name: str) -> str:
    if curve is None:
        return ""
    which = "the database" if name == "database" else "the database of --also-db"
    lines = [f"bits/byte over chunks that share a run of at most α of their length with {which}"]
    modes = list(curve["bits_per_byte"])
    lines.append(f"{'α':>7} {'chunks':>9}" + "".join(f" {NAMES.get(mode, mode):>9}" for mode in modes))
    for row, alpha in enumerate(curve["alpha"]):
        bits = [curve["bits_per_byte"][mode][row] for mode in modes]
        shown = "".join(f" {'—' if value is None else f'{value:.4f}':>9}" for value in bits)
        lines.append(f"{alpha:>7.1%} {curve['chunks'][row]:>9,}{shown}")
    return "\n".join(lines)


def _questions(result: dict[str, Any]) -> str:
    lines = [f"{result['count']:,} questions", f"{'retrieval':<10} {'exact match':<28} {'F1':<28}"]
    for mode, figures in result["modes"].items():
        cells = [
            f"{figures[name]:.1%} {interval(figures[f'{name}_interval'], '.1%')}" for name in ("exact_match", "f1")
        ]
        lines.append(f"{NAMES.get(mode, mode):<10} {cells[0]:<28} {cells[1]:<28}".rstrip())
    return "\n".join(lines)


def interval(bounds: list[float] | None, form: str = ".4f") -> str:
    """`low … high`, or a dash for what cannot be known from a single document."""
    return f"{bounds[0]:{form}} … {bounds[1]:{form}}" if bounds else "—"


def _signed(bounds: list[float] | None) -> str:
    return f"[{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "[—]"
