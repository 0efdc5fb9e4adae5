"""Parts of the pages a run leaves: the frame, the verdict, the tables, the pictures in them."""

import base64
from html import escape
from typing import Any

from gradsurgery.text import show
from gradsurgery.unlearn.jobs.stages import TRAINED
from gradsurgery.unlearn.report import plots, tables
from gradsurgery.unlearn.report.labels import title
from gradsurgery.unlearn.report.tables import Cell, Row
from gradsurgery.unlearn.report.verdict import (
    Summary,
    fractions,
    methods,
    overall,
    ranking,
    sentences,
)

BEST = 4  # methods that stand out in a picture; the others are faint
STYLE = """
:root { --ink: #1b1e23; --soft: #5b616a; --line: #e3e6ea; --accent: #0072b2; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 44px 0 10px; padding-top: 14px;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { max-width: 46em; }
.soft, figcaption, .note { color: var(--soft); }
.note, figcaption { font-size: .875rem; }
.verdict p { margin: 0 0 .5em; max-width: none; }
.verdict p:last-child { margin: 0; }
.verdict { font-size: clamp(1.05rem, 3vw, 1.25rem); background: var(--wash); max-width: none;
  border-left: 4px solid var(--accent); padding: 16px 18px; margin: 20px 0; }
.figures { display: grid; gap: 12px; margin: 8px 0 18px;
  grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); }
.figure { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.figure b { display: block; font-size: 1.55rem; line-height: 1.2; }
.figure span { display: block; font-size: .82rem; color: var(--soft); }
.grid { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.grid.one { max-width: 560px; }
.grid.small { gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; }
th, td, .figure b { font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td small { color: var(--soft); display: block; }
thead th { border-bottom: 2px solid var(--ink); }
td.main { font-weight: 600; }
tr.group td { font-weight: 600; padding-top: 14px; color: var(--soft); }
details { margin: 10px 0; }
summary { cursor: pointer; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  th, td { padding: 6px 8px; }
  .numbers td:first-child { white-space: normal; min-width: 7em; max-width: 8.5em; }
}
"""


def page(heading: str, body: str) -> str:
    """A page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def verdict(summary: Summary) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(summary))
    return f'<div class="verdict">{text}</div>'


def best_of(summary: Summary, fraction: float) -> list[str]:
    """The stages that stand out in the pictures."""
    return [place.name for place in ranking(summary, fraction)[:BEST]]


def numbers(summary: Summary) -> str:
    """The tables of every share of the retain set, the main one and, folded, all there is."""
    shares = fractions(summary)
    text = ""
    for fraction in shares or [1.0]:
        if shares not in ([], [1.0]):
            text += f"<h3>{escape(tables.heading(fraction))}</h3>"
        text += _main(*tables.main_table(summary, fraction))
        text += f"<details><summary>Every number</summary>{_full(summary, fraction)}</details>"
    return text + NOTE


NOTE = """<p class="note">Accuracies are shares in [0, 1], mean and standard deviation over seeds,
retain accuracy over all of the retain set. Retrain never saw the forget set: the nearer to it the
better, and past it is not better still. gap: distance to Retrain of the same seed, a mean over the
accuracies and the attack; behind: its difference to the best method's over the same seeds, mean
and standard error. attack: how often a regression on a sample's loss says rightly whether it
was forgotten or never seen; 0.5 is guessing, but wrong labels or an unseen digit stand out in
Retrain as well. Seconds are those of the training steps alone.</p>"""


def _main(header: list[str], rows: list[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for row in rows:
        cells = "".join(
            _cell(cell, name == "gap") for name, cell in zip(header, row.cells, strict=True)
        )
        body += f"<tr><td>{_named(row.name)}</td>{cells}</tr>"
    return _table(f"<th></th>{head}", body)


def _full(summary: Summary, fraction: float) -> str:
    """Metrics down in groups, Original | Retrain | methods across."""
    names = [*(n for n in TRAINED if n in summary["columns"]), *methods(summary, fraction)]
    head = "".join(f"<th>{_named(name)}</th>" for name in names)
    body = ""
    for group, rows in tables.full_table(summary, fraction).items():
        body += f'<tr class="group"><td>{escape(group)}</td>{"<td></td>" * len(names)}</tr>'
        for row in rows:
            cells = "".join(map(_cell, row.cells))
            body += f"<tr><td>{escape(row.title)}</td>{cells}</tr>"
    return _table(f"<th></th>{head}", body)


def _named(stage: str) -> str:
    """A stage's title after a dot of its color, on the same line."""
    return f'<span style="color:{plots.color(stage)}">●</span>&nbsp;{escape(title(stage))}'


def _cell(cell: Cell, main: bool = False) -> str:
    below = f"<small>± {escape(cell.spread)}</small>" if cell.spread else ""
    return f"<td{' class=main' if main else ''}>{escape(cell.text)}{below}</td>"


def _table(head: str, body: str) -> str:
    return (
        f'<div class="scroll numbers"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def sweep(summary: Summary) -> str:
    """The picture over shares of the retain set; empty where there is one share alone."""
    order = overall(summary)
    if not order:
        return ""
    return (
        '<h2>With fewer samples to keep</h2><div class="grid one">'
        + figure(
            plots.sweep(summary, order, BEST),
            "Mean gap to Retrain, which has the whole retain set, the lower the better; bars: "
            f"standard error over seeds, of the {BEST} best on average. Gaps under "
            f"{plots.LEAST_GAP} points are drawn there.",
        )
        + "</div>"
    )


def joined(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def facts(known: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(show(key))}</td><td class='text'>{escape(show(value, 2000))}</td></tr>"
        for key, value in known.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def figure(svg: str, caption: str, alt: str = "") -> str:
    # as an image, not inline: the ids of one SVG then cannot meet those of another
    data = base64.b64encode(svg.encode()).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{escape(alt or caption, quote=True)}" '
        f'src="data:image/svg+xml;base64,{data}">{text}</figure>'
    )
