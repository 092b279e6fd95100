"""What the report's charts and tables stand in: titled cards, sections, and what a caption says of a curve."""

import html
from collections.abc import Iterable, Sequence

from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import Line, Panel, number


def figure(
    title: str, picture: str, text: str, lines: Iterable[Line] = (), *, scale: tuple[str, str] | None = None
) -> str:
    """HTML of a titled card: a key of `lines` or of the heat map's two ends, the picture, what it shows (as HTML)."""
    keys = "".join(
        f'<span class="key{" dashed" * line.dashed}" style="--c:var(--{line.colour})">{html.escape(line.name)}</span>'
        for line in lines
    )
    legend = f'<div class="keys">{keys}</div>' if keys else ""
    if scale:
        ends = f'<span>{scale[0]}</span><span class="scale"></span><span>{scale[1]}</span>'
        legend = f'<div class="keys heat">{ends}</div>'
    picture = legend + picture if picture else '<p class="none">Not measured yet.</p>'
    return f"<figure><h3>{html.escape(title)}</h3>{picture}<figcaption>{text}</figcaption></figure>"


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """HTML of a table with a heading a column and a label a row."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *heads))
    rows = [(label, [html.escape(cell).replace("± ", "±&nbsp;") for cell in cells]) for label, cells in rows]
    body = "".join(
        f"<tr><th>{html.escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for label, cells in rows
    )
    rows_html = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{rows_html}</table></div>'


def section(name: str, title: str, intro: str, *grids: Sequence[str]) -> str:
    cards = "".join(f'<div class="grid-cards">{"".join(figures)}</div>' for figures in grids if figures)
    return f'<section id="{name}"><h2>{title}</h2><p>{intro}</p>{cards}</section>'


def panels(stages: Sequence[Stage]) -> list[Panel]:
    return [Panel(stage.title, stage.last_step) for stage in stages]


def change(stage: Stage, key: str, scale: float = 1.0) -> str:
    """ " (6.2 → 2.1)": means over the first and last twentieth of the logged values."""
    values = stage.values(key, scale)[:, 1]
    if len(values) < 2:
        return ""
    part = max(1, len(values) // 20)
    first, last = (number(float(f"{values[span].mean():.3g}")) for span in (slice(part), slice(-part, None)))
    return f" ({first} → {last})"
