"""Charts of the report as inline SVG: lines over steps, tokens or time, and heat maps.

Colours are CSS variables of the page, so that one picture serves a light and a dark background. A chart may
span several stages: each gets a panel of equal width with its own step axis, since their lengths differ.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 34, 34
PLOT_WIDTH = WIDTH - LEFT - RIGHT
MAX_POINTS = 320  # of a line: more cannot be told apart at this width
UNDER, OVER = "#2f7fc1", "#e0701a"  # readable on light and dark, and to the colour-blind
SHADES = 20  # of each of the two: no step between them can be seen, and cells of one are one path


@dataclasses.dataclass(frozen=True)
class Panel:
    """A part of the x axis: one stage, from step 0 to its last step, or to so many of what ``axis`` counts.

    ticks: (place, text), of an axis that is not linear; round numbers where there are none."""

    label: str
    last_step: float
    axis: str = "step"
    ticks: tuple[tuple[float, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """A quantity over time: for each panel an array (points, 3) of step, value, standard error (0: none)."""

    name: str
    colour: str
    points: Sequence[np.ndarray]
    dashed: bool = False


def line_chart(
    panels: Sequence[Panel],
    lines: Sequence[Line],
    *,
    unit: str,
    low: float | None = None,
    high: float | None = None,
    right: Sequence[Line] = (),
    right_unit: str = "",
) -> str:
    """SVG of `lines` over the `panels` that have points, "" if none has; `low` and `high` fix the y axis. Lines of
    another unit have an axis at the `right`, from 0 on."""
    drawn = [*lines, *right]
    kept = [index for index in range(len(panels)) if any(len(line.points[index]) for line in drawn)]
    if not kept:
        return ""
    panels = [panels[index] for index in kept]
    lines, right = (
        [dataclasses.replace(line, points=[line.points[index] for index in kept]) for line in some]
        for some in (lines, right)
    )
    ticks, y_of = _y_axis(lines, low, high)
    parts = [_text(2, 11, unit, "start")]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 5, y + 4, number(tick), "end"))
    parts += _step_axis(panels, HEIGHT - BOTTOM)
    parts += _curves(lines, panels, y_of)
    width, said = WIDTH, unit
    if right:
        width, said = WIDTH + LEFT - RIGHT, f"{unit}, {right_unit}"
        ticks, y_of = _y_axis(right, 0.0, None)
        parts.append(_text(width - 2, 11, right_unit, "end"))
        parts += [_text(WIDTH - RIGHT + 5, y_of(tick) + 4, number(tick), "start") for tick in ticks]
        parts += _curves(right, panels, y_of)
    label = html.escape(f"{', '.join(line.name for line in drawn)} over {panels[0].axis}, {said}")
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _y_axis(lines: Sequence[Line], low: float | None, high: float | None):
    """The ticks of what these lines need, and where a value lies."""
    values = np.concatenate([points for line in lines for points in line.points])
    bottom = min(values[:, 1] - values[:, 2]) if low is None else low
    top = max(values[:, 1] + values[:, 2], default=1.0) if high is None else high
    if low is not None and top <= low:
        top = low + 1
    ticks = _ticks(float(bottom), float(top))
    return ticks, _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)


def _curves(lines: Sequence[Line], panels: Sequence[Panel], y_of) -> list[str]:
    return [
        _curve(_panel_scale(panels, index)(points[:, 0]), y_of(points[:, 1]), line, _bar_ends(points, y_of))
        for line in lines
        for index, points in enumerate(line.points)
        if len(points)
    ]


def heat_map(ratio_EC: np.ndarray, panels: Sequence[Panel], *, limit: float, numbers: bool = False) -> str:
    """SVG of shares relative to the fair share: row = expert, columns split evenly among `panels`.

    1 is transparent, 1/limit and less the full blue, limit and more the full orange (logarithmic between).
    Panels with last_step 0 have a label but no step axis; `numbers` writes the values into the cells.
    """
    experts, columns = ratio_EC.shape
    row = max(2.0, min(18.0, 270 / experts))
    bottom = TOP + row * experts
    depth = np.clip(np.log(np.maximum(ratio_EC, 1e-9)) / math.log(limit), -1, 1)
    parts = [
        f'<g class="heat" transform="translate({LEFT} {TOP + row / 2}) scale({PLOT_WIDTH / columns:.4f} {row})">',
        f"{_cells(np.round(depth * SHADES).astype(int))}</g>",
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{PLOT_WIDTH}" height="{row * experts:.1f}"/>',
        _text(2, 11, "expert", "start"),
    ]
    stride = math.ceil(13 / row)
    for expert in range(0, experts, stride):
        parts.append(_text(LEFT - 5, TOP + row * (expert + 0.5) + 4, str(expert), "end"))
    if numbers and row >= 13:
        for expert, column in np.ndindex(experts, columns):
            x, y = LEFT + PLOT_WIDTH * (column + 0.5) / columns, TOP + row * (expert + 0.5) + 4
            parts.append(_text(x, y, f"{ratio_EC[expert, column]:.1f}", "middle", "cell"))
    parts += _step_axis(panels, bottom)
    height = bottom + (BOTTOM if any(panel.last_step for panel in panels) else 6)
    label = f"heat map, {experts} experts by {html.escape(', '.join(panel.label for panel in panels))}"
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def pairs_chart(
    rows: Sequence[tuple[str, tuple[float, float] | None, tuple[float, float] | None]],
    *,
    unit: str,
    low: float,
    high: float,
) -> str:
    """SVG of a row a label: what was before (slate) and after (green), each (value, standard error) or nothing."""
    left, height = 130, 24
    bottom = TOP + height * len(rows)
    x_of = _scale(low, high, left, WIDTH - 14)
    parts = [_text(left, TOP - 12, unit, "start")]
    for tick in _ticks(low, high):
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, number(tick), "middle"))
    for index, (label, before, after) in enumerate(rows):
        y = TOP + height * (index + 0.5)
        parts.append(_text(left - 8, y + 4, label if len(label) < 21 else f"{label[:19]}…", "end"))
        if before and after:
            parts.append(f'<line class="axis" x1="{x_of(before[0]):.1f}" x2="{x_of(after[0]):.1f}" y1="{y}" y2="{y}"/>')
        for name, (value, error) in ((name, v) for name, v in (("slate", before), ("green", after)) if v):
            bar = f'<path class="line thin" d="M{x_of(value - error):.1f},{y}H{x_of(value + error):.1f}"/>'
            dot = f'<circle class="dot" cx="{x_of(value):.1f}" cy="{y}" r="4"/>'
            parts.append(f'<g style="--c:var(--{name})">{bar}{dot}</g>')
    said = html.escape(f"before and after: {', '.join(label for label, *_ in rows)}, {unit}")
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def _cells(shade_EC: np.ndarray) -> str:
    """One path a shade, in units of a cell; none is opaque, so that a number on it stays readable."""
    return "".join(
        f'<path stroke="{UNDER if shade < 0 else OVER}" opacity="{0.8 * abs(shade) / SHADES:.2f}" '
        f'd="{"".join(f"M{column} {row}h1" for row, column in np.argwhere(shade_EC == shade))}"/>'
        for shade in np.unique(shade_EC[shade_EC != 0])
    )


def _step_axis(panels: Sequence[Panel], bottom: float) -> list[str]:
    """Labels above the panels, lines between them, step ticks and the axis title below."""
    parts, width = [], PLOT_WIDTH / len(panels)
    for index, panel in enumerate(panels):
        left = LEFT + index * width
        if len(panels) > 1:
            parts.append(_text(left + width / 2, TOP - 6, panel.label, "middle"))
        if index:
            parts.append(f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>')
        if panel.last_step:
            round_ones = [tick for tick in _ticks(0, panel.last_step, 5) if tick <= 1.001 * panel.last_step]
            places = round_ones if len(panels) == 1 else (0, panel.last_step)
            for tick, said in panel.ticks or [(tick, number(tick)) for tick in places]:
                x = _panel_scale(panels, index)(tick)
                first, last = tick == 0 and bool(len(panels) > 1 or panel.ticks), tick == panel.last_step
                anchor = "start" if first else "end" if last else "middle"
                parts.append(_text(x + 2 * first - 2 * last, bottom + 14, said, anchor))
    if any(panel.last_step for panel in panels):
        parts.append(_text(LEFT + PLOT_WIDTH / 2, bottom + 29, panels[0].axis, "middle"))
    return parts


def _curve(x: np.ndarray, y: np.ndarray, line: Line, bar_ends: np.ndarray | None) -> str:
    """Points with error bars where there are errors; else the values, faint, under their moving average."""
    style = f'style="--c:var(--{line.colour})"'
    css = "line dashed" if line.dashed else "line"
    if bar_ends is not None or len(x) == 1:
        ends = np.stack([y, y]) if bar_ends is None else bar_ends
        bars = "".join(f"M{a:.1f},{b:.1f}V{c:.1f}" for a, b, c in zip(x, *ends, strict=True))
        dots = "".join(f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(x, y, strict=True))
        return f'<g {style}><path class="line thin" d="{bars}"/><path class="{css}" d="{_path(x, y)}"/>{dots}</g>'
    width = math.ceil(len(x) / MAX_POINTS)
    x, y = (np.array([v[i : i + width].mean() for i in range(0, len(v), width)]) for v in (x, y))
    half = len(x) // 40
    if half == 0:
        return f'<path class="{css}" {style} d="{_path(x, y)}"/>'
    smooth = np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])
    faint, bold = (
        f'<path class="line faint" d="{_path(x, y)}"/>',
        f'<path class="{css}" d="{_path(x, smooth)}"/>',
    )
    return f"<g {style}>{faint}{bold}</g>"


def _bar_ends(points: np.ndarray, y_of) -> np.ndarray | None:
    if not points[:, 2].any():
        return None
    return np.stack([y_of(points[:, 1] - points[:, 2]), y_of(points[:, 1] + points[:, 2])])


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _panel_scale(panels: Sequence[Panel], index: int):
    width = PLOT_WIDTH / len(panels)
    gap = 3 if len(panels) > 1 else 0  # keeps a stage's first and last point off the line between panels
    left = LEFT + index * width
    return _scale(0, panels[index].last_step or 1, left + gap, left + width - gap)


def _scale(low: float, high: float, start: float, end: float):
    """The linear map of [low, high] to [start, end], clipped."""
    return lambda value: start + (end - start) * np.clip((value - low) / (high - low), 0, 1)


def _ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) from at most `low` to at least `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """At most four significant digits, 1,000 separators, small ones as 1e−4."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _text(x: float, y: float, text: str, anchor: str, css: str = "label") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
