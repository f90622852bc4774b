"""The report's drawings as SVG text; colors and fonts are the style sheet's, by class."""

import html
import itertools
import math
from typing import Any

WIDTH = 720
_LEFT, _RIGHT = 56, 70  # room for the ticks' and the lines' names


def lines(curve: dict[str, Any], names: dict[str, str]) -> str:
    """Bits per byte over α, a line a mode, with the number of chunks under each α."""
    modes = [mode for mode, values in curve["bits_per_byte"].items() if any(value is not None for value in values)]
    points = {
        mode: [(a, v) for a, v in zip(curve["alpha"], curve["bits_per_byte"][mode], strict=True) if v is not None]
        for mode in modes
    }
    values = [value for line in points.values() for _, value in line]
    if not values:
        return ""
    top, bottom, ticks = 30, 262, nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(alpha: float) -> float:
        first, last = curve["alpha"][0], curve["alpha"][-1]
        return _LEFT + 14 + (WIDTH - _LEFT - _RIGHT - 28) * (alpha - first) / (last - first)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [_text(0, 10, "bits per byte", "name")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y(tick) + 4, f"{tick:g}", "tick end"))
    for alpha, count in zip(curve["alpha"], curve["chunks"], strict=True):
        parts.append(_text(x(alpha), bottom + 20, f"{100 * alpha:g}%", "tick middle"))
        parts.append(_text(x(alpha), bottom + 40, f"{count:,}", "tick middle"))
    parts.append(_text(0, bottom + 20, "r ≤", "tick"))
    parts.append(_text(0, bottom + 40, "chunks", "tick"))
    ends = apart({mode: y(points[mode][-1][1]) + 4 for mode in modes}, 16)
    for mode in modes:
        path = "M" + "L".join(f"{x(alpha):.1f} {y(value):.1f}" for alpha, value in points[mode])
        parts.append(f'<path class="line {mode}" d="{path}"/>')
        for alpha, value in points[mode]:
            told = f"{names[mode]}, r ≤ {100 * alpha:g}%: {value:.4f} bits per byte"
            parts.append(
                f'<circle class="dot {mode}" cx="{x(alpha):.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{html.escape(told)}</title></circle>"
            )
        parts.append(_text(x(points[mode][-1][0]) + 14, ends[mode], names[mode], f"name {mode}"))
    return _svg(bottom + 50, "Bits per byte over chunks by the run they share", parts)


def differences(rows: list[tuple[str, str, float, list[float] | None]]) -> str:
    """Differences of loss with their intervals around a line at zero.

    Args:
        rows: (name, class, difference, interval or None).
    """
    bounds = [bound for _, _, value, interval in rows for bound in (value, *(interval or ()))]
    if not bounds:
        return ""
    ticks = nice_ticks(min(0.0, *bounds), max(0.0, *bounds))
    left, step = 150, 34
    bottom = step * len(rows) + 6

    def x(value: float) -> float:
        return left + (WIDTH - left - 30) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        zero = " zero" if tick == 0 else ""
        parts.append(f'<path class="grid{zero}" d="M{x(tick):.1f} 4V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 18, f"{tick:+g}" if tick else "0", "tick middle"))
    for row, (name, kind, value, interval) in enumerate(rows):
        middle = step * row + step / 2 + 4
        low, high = interval or (value, value)
        parts.append(_text(left - 14, middle + 4, name, "name end"))
        parts.append(f'<path class="whisker {kind}" d="M{x(low):.1f} {middle}H{x(high):.1f}"/>')
        told = f"{name}: {value:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if interval else "")
        title = f"<title>{html.escape(told)}</title>"
        parts.append(f'<circle class="dot {kind}" cx="{x(value):.1f}" cy="{middle}" r="5">{title}</circle>')
    return _svg(bottom + 28, "Paired differences of loss", parts)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`; at least two."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (power * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def apart(positions: dict[str, float], distance: float) -> dict[str, float]:
    """The same positions, moved so that neighbors are at least `distance` from one another."""
    order = sorted(positions, key=lambda name: positions[name])
    moved = [positions[name] for name in order]
    for _ in range(100):
        for row, (above, below) in enumerate(itertools.pairwise(moved)):
            if below - above < distance - 1e-6:
                middle = (above + below) / 2
                moved[row], moved[row + 1] = middle - distance / 2, middle + distance / 2
    return dict(zip(order, moved, strict=True))


def _svg(height: float, label: str, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
