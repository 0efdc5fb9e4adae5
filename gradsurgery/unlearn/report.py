"""report.html: one self-contained page, the verdict first, pictures next, settings last."""

import base64
from html import escape
from statistics import mean, stdev
from typing import Any

from gradsurgery.unlearn import plots
from gradsurgery.unlearn.labels import LABELS, NAMES
from gradsurgery.unlearn.metrics import spread
from gradsurgery.unlearn.plots import COLORS

TITLES = {
    "mislabeled": "Unlearning mislabeled digits",
    "class": "Unlearning one digit",
    "random": "Unlearning random digits",
}
NOT_MEASURED = (
    "Unlearning here is approximate: no proof and no certified deletion. Not measured: stronger "
    "attacks than one on the loss (with shadow models, or on several outputs), how fast the "
    "forgotten can be learned again, the distance of outputs to Retrain's, peak memory."
)
REAL = (
    "The images are real: 1,797 digits written by hand, from scikit-learn (UCI's Optical "
    "Recognition of Handwritten Digits). Test is one fixed set of 360; validation (180) and "
    "training (1,257) are drawn by the seed. "
)
REAL_TASK = {
    "mislabeled": "The wrong labels are made up: 100 training samples each get another, at random.",
    "class": "Nothing in them is made up.",
    "random": "Nothing in them is made up.",
}
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
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
tr.total td { font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  th, td { padding: 6px 8px; }
  .numbers td:first-child { white-space: normal; min-width: 6.5em; max-width: 7.5em; }
}
"""


def render(
    summary: dict[str, Any],
    config: dict[str, Any],
    environment: dict[str, Any],
    records: list[dict[str, Any]],
    results: list[dict[str, Any]],
) -> str:
    """The page, from what the files of a run directory hold."""
    columns, task, seeds = summary["columns"], summary["task"], summary["seeds"]
    methods = [name for name in columns if name not in ("original", "retrain")]
    steps = plots.by_stage(records)
    forget = summary["forget_sets"][str(seeds[0])]
    samples = sorted({entry["samples"] for entry in summary["forget_sets"].values()})
    size = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    digits = sorted({e["class"] for e in summary["forget_sets"].values() if e["class"] is not None})
    what = {
        "mislabeled": f"{size} training samples with wrong labels",
        "class": f"every training sample of digit {', '.join(map(str, digits))} ({size} samples"
        + (", one digit a seed)" if len(digits) > 1 else ")"),
        "random": f"{size} training samples drawn at random",
    }[task]
    runs = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so no spread"
    body = f"""
<h1>{TITLES[task]}</h1>
<p class="soft">To forget: {escape(what)}. To keep: everything else. {runs}.</p>
{verdict(summary, methods)}
<h2>The numbers</h2>
{numbers(summary)}
{pictures(summary, methods, steps, results)}
<h2>What is real, and what these numbers cannot say</h2>
<p>{REAL}{REAL_TASK[task]}</p>
<p>{NOT_MEASURED}</p>
<h2>Settings</h2>
{settings(config, methods)}
<h3>Environment</h3>
{_facts({**environment, "packages": _joined(environment["packages"])})}
<p class="note">Forget set of seed {seeds[0]}, SHA-256 of its sorted sample indices:
<code style="overflow-wrap: anywhere">{forget["sha256"]}</code></p>
"""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLES[task]}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def verdict(summary: dict[str, Any], methods: list[str]) -> str:
    """How far from Retrain, at what cost, in words and in a few large figures."""
    columns = summary["columns"]
    if not methods:
        return (
            '<p class="verdict">Only the original and the retrained model were made: '
            "there is no unlearning method to judge.</p>"
        )
    order = sorted(methods, key=lambda name: columns[name]["gap_mean"]["mean"])
    best = order[0]

    def value(name: str, key: str) -> float:
        return columns[name][key]["mean"]

    ratio = value(best, "seconds") / value("retrain", "seconds")
    distance = f"{100 * value(best, 'gap_mean'):.1f} points"
    lead = f"<b>{NAMES[best]}</b> ends {distance} from Retrain on average over the metrics below"
    if len(order) > 1:
        lead = f"<b>{NAMES[best]}</b> comes closest to Retrain: {distance} away on average"
        others = ", ".join(
            f"{NAMES[name]} {100 * value(name, 'gap_mean'):.1f}" for name in order[1:]
        )
        lead += f" ({others})"
        # fewer than three seeds give no standard error worth the name
        several = len(summary["seeds"]) > 2
        tied = [
            NAMES[name] for name in order[1:] if several and not told_apart(columns, best, name)
        ]
        if tied:
            lead += f"; these seeds cannot tell {' or '.join(tied)} from it"
    start = 100 * value("original", "gap_mean")
    text = (
        f"{lead}. The original model starts {start:.1f} points away. "
        f"{NAMES[best]} took {value(best, 'seconds'):.1f} s, {ratio:.2f} times retraining "
        f"({value('retrain', 'seconds'):.1f} s)."
    )
    shown = {
        "mislabeled": ("repaired", "forget-set samples given their true label"),
        "class": ("test_forgotten", "of the forgotten digit still recognized on test"),
        "random": ("forget", "accuracy on the forget set"),
    }[summary["task"]]
    cards = [
        (shown[0], shown[1]),
        ("retain", "accuracy on the retain set"),
        ("test", "accuracy on test" + (", other digits" if summary["task"] == "class" else "")),
        ("mia", "accuracy of a membership attack"),
    ]
    figures = "".join(
        f'<div class="figure"><b>{value(best, key):.3f}</b><span>{label}</span>'
        f"<span>Retrain {value('retrain', key):.3f}, Original {value('original', key):.3f}</span>"
        "</div>"
        for key, label in cards
    )
    return f'<p class="verdict">{text}</p><p class="note">{NAMES[best]}:</p>' + (
        f'<div class="figures">{figures}</div>'
    )


def told_apart(columns: dict[str, Any], best: str, other: str) -> bool:
    """Whether the gaps to Retrain differ by over two standard errors of the paired difference."""
    pairs = zip(
        columns[best]["gap_mean"]["values"], columns[other]["gap_mean"]["values"], strict=True
    )
    differences = [b - a for a, b in pairs]
    return mean(differences) > 2 * stdev(differences) / len(differences) ** 0.5


def numbers(summary: dict[str, Any]) -> str:
    """The table: metrics down, Original | Retrain | methods across."""
    columns = summary["columns"]
    head = "".join(
        f'<th><span class="dot" style="background:{COLORS[name]}"></span>{NAMES[name]}</th>'
        for name in columns
    )
    rows = []
    for key, label in LABELS.items():
        if not any(key in column for column in columns.values()):
            continue
        cells = []
        for column in columns.values():
            entry, gap = column.get(key), column.get(f"gap_{key}")
            if entry is None:
                cells.append("<td></td>")
                continue
            digits = {"seconds": 1, "steps": 0}.get(key, 3)
            text = f"{entry['mean']:.{digits}f}"
            if entry["std"] is not None and key != "steps":
                text += f" ± {entry['std']:.{digits}f}"
            below = f"<small>gap {gap['mean']:.3f}</small>" if gap else ""
            cells.append(f"<td>{text}{below}</td>")
        kind = ' class="total"' if key == "gap_mean" else ""
        rows.append(f"<tr{kind}><td>{label}</td>{''.join(cells)}</tr>")
    return f"""<div class="scroll numbers"><table><thead><tr><th></th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<p class="note">Accuracies are shares in [0, 1], mean ± standard deviation over seeds; gap is the
distance to Retrain of the same seed. Retrain never saw the forget set: the nearer to it the
better, and past it is not better still. The membership attack says from a sample's loss whether it
was forgotten or never seen; 0.5 is guessing, but wrong labels or an unseen digit stand out in
Retrain as well. UIS, lower is better, weighs lost test accuracy against what is still known of the
forget set. Seconds are those of the training
steps alone.</p>"""


def pictures(
    summary: dict[str, Any],
    methods: list[str],
    steps: plots.Records,
    results: list[dict[str, Any]],
) -> str:
    """Every figure with a caption that says what to look for."""
    first = summary["seeds"][0]
    losses = {r["method"]: r["losses"] for r in results if r["seed"] == first}
    shown = [name for name in ("original", "retrain", *methods) if name in losses]
    faint = " Faint: the other seeds." if len(summary["seeds"]) > 1 else ""
    page = ""
    if methods:
        page += "<h2>Forgetting against keeping</h2><div class='grid'>"
        page += _figure(
            plots.tradeoff(steps, methods, "retain_accuracy", "accuracy on retained samples"),
            "Paths of the methods from Original (square) towards Retrain (star). A path that sinks "
            f"before it has gone left forgets at the price of what should stay.{faint}",
        )
        page += _figure(
            plots.tradeoff(steps, methods, "validation_accuracy", "accuracy on validation"),
            f"The same paths against samples no model was trained on.{faint}",
        )
        page += "</div><h2>Over the steps</h2><div class='grid'>"
        page += _figure(
            plots.curves(steps, methods, "forget_loss", "forget loss (nats)"),
            f"Mean loss on the forget set: unlearning raises it.{faint}",
        )
        page += _figure(
            plots.curves(steps, methods, "retain_loss", "retain loss (nats)"),
            f"Mean loss on 256 retained samples: it should stay low.{faint}",
        )
        page += "</div>"
    page += "<h2>Losses of the forget set and of unseen samples</h2><div class='grid small'>"
    for name in shown:
        drawn = plots.histogram(losses[name]["forget"], losses[name]["test"], name)
        page += _figure(drawn, "", alt=f"loss histogram, {NAMES[name]}")
    page += (
        "</div><p class='note'>Seed "
        f"{first}. A method is done when its two shapes lie to each other as Retrain's do.</p>"
    )
    if "orthograd" in methods:
        page += "<h2>Inside OrthoGrad's steps</h2><div class='grid'>"
        page += _figure(
            plots.surgery(steps, {"cosine_mean": "mean", "cosine_max": "largest"}, "cosine"),
            "Cosine of the forget gradient with the retain samples' gradients. Above zero, "
            f"climbing the forget loss as it is would raise that sample's loss as well.{faint}",
        )
        page += _figure(
            plots.surgery(steps, {"conflict_rate": ""}, "conflict rate"),
            f"Share of retain samples with a cosine above zero.{faint}",
        )
        page += _figure(
            plots.surgery(steps, {"kept_norm": ""}, "kept norm"),
            "Length of the forget gradient after the projection over its length before: 1 nothing "
            "was removed. 0 also where every forget sample is past the ceiling and none pushes."
            f"{faint}",
        )
        page += _figure(
            plots.surgery(steps, {"rank": ""}, "rank"),
            f"Independent directions among the retain gradients of a batch.{faint}",
        )
        page += "</div>"
    page += f"<h2>Cost</h2>{step_cost(summary)}<div class='grid one'>"
    page += _figure(
        plots.cost(summary["columns"]),
        "Dotted: Retrain. So small a model retrains in seconds: time is no reason to unlearn here.",
    )
    return page + "</div>"


def step_cost(summary: dict[str, Any]) -> str:
    """One OrthoGrad step beside one plain training step; empty where none was timed."""
    if "step" not in summary:
        return ""
    seconds = summary["step"]["seconds"]
    pairs = zip(seconds["orthograd"]["values"], seconds["plain"]["values"], strict=True)
    ratios = spread([ours / plain for ours, plain in pairs])

    def card(entry: dict[str, Any], scale: float, unit: str, label: str) -> str:
        off = "" if entry["std"] is None else f"<span>± {scale * entry['std']:.2f}{unit}</span>"
        return (
            f'<div class="figure"><b>{scale * entry["mean"]:.2f}{unit}</b>'
            f"<span>{label}</span>{off}</div>"
        )

    cards = (
        card(seconds["orthograd"], 1000, " ms", "an OrthoGrad step"),
        card(seconds["plain"], 1000, " ms", "a plain training step on the same samples"),
        card(ratios, 1, " times", "as long: the price of the surgery"),
    )
    return (
        f"<div class='figures'>{''.join(cards)}</div><p class='note'>Each seed's median of steps "
        "taken in turns on a copy of the model; mean ± standard deviation over seeds. Plain: the "
        "gradient of the mean loss and the same optimizer.</p>"
    )


def settings(config: dict[str, Any], methods: list[str]) -> str:
    """Every option of the run, a folded table a section."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    text = _facts({key: _joined(value) for key, value in plain.items()})
    for name in ("training", *methods):
        title = "Original and Retrain" if name == "training" else NAMES[name]
        text += f"<details><summary>{title}</summary>{_facts(config[name])}</details>"
    return text


def _joined(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td class='text'>{escape(str(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _figure(svg: str, caption: str, alt: str = "") -> str:
    # as an image, not inline: the ids of one SVG then cannot meet those of another
    data = base64.b64encode(svg.encode()).decode()
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{escape(alt or caption, quote=True)}" '
        f'src="data:image/svg+xml;base64,{data}">{text}</figure>'
    )
