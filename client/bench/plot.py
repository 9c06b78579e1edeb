"""Two plots as SVG text: curves and bars, with axes and round ticks. Enough for a report that opens anywhere, without a library."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Curve", "bars_svg", "curves_svg", "ticks"]

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40
_COLOURS = ("#2463eb", "#e0662f", "#1a936f", "#8b5cf6")


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]  # (x, y), both 0 or more


def ticks(end: float, most: int = 6) -> list[float]:
    """0 and round steps of 1, 2 or 5 times a power of ten up to `end`, at most `most` + 1 of them; end > 0."""
    rough = end / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(int(end / step + 1e-9) + 1)]


def curves_svg(curves: Sequence[Curve], x_name: str, y_name: str) -> str:
    """Empty text when there is nothing to draw."""
    if not any(curve.points for curve in curves):
        return ""
    frame = _Frame(
        max(x for curve in curves for x, _ in curve.points) or 1.0, max(y for curve in curves for _, y in curve.points) or 1.0
    )
    lines = []
    for index, curve in enumerate(curves):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
        colour = _COLOURS[index % len(_COLOURS)]
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        at = _LEFT + 12 + 90 * index
        lines.append(f'<text x="{at}" y="{_TOP + 12}" fill="{colour}">{html.escape(curve.name)}</text>')
    return frame.draw(lines, x_name, y_name)


def bars_svg(values: Sequence[float], end: float, x_name: str, y_name: str) -> str:
    """Bars of equal width from 0 to `end`. Empty text when every value is 0."""
    if not any(values):
        return ""
    frame = _Frame(end, max(values))
    width = (_WIDTH - _LEFT - _RIGHT) / len(values)
    bars = [
        f'<rect x="{_LEFT + index * width:.1f}" y="{frame.y(value):.1f}" width="{max(width - 1, 0.5):.1f}" '
        f'height="{frame.y(0) - frame.y(value):.1f}" fill="{_COLOURS[0]}"/>'
        for index, value in enumerate(values)
    ]
    return frame.draw(bars, x_name, y_name)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Maps values to pixels and draws the axes."""

    x_end: float
    y_end: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.x_end * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.y_end * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self, shapes: Sequence[str], x_name: str, y_name: str) -> str:
        floor = self.y(0)
        parts = [f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - _RIGHT}" y2="{floor}" stroke="#9aa7b5"/>']
        for value in ticks(self.x_end):
            parts.append(f'<text x="{self.x(value):.1f}" y="{floor + 16}" text-anchor="middle">{value:g}</text>')
        for value in ticks(self.y_end, 4):
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e6ebf0"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{html.escape(x_name)}</text>')
        parts.append(f'<text x="4" y="{_TOP + 2}">{html.escape(y_name)}</text>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#5b6b7d">'
            f"{''.join(parts)}{''.join(shapes)}</svg>"
        )
