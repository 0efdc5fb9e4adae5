"""The pictures of a page in their order, with the words below each that say what to look for."""

from __future__ import annotations

import base64
from typing import Any, Literal, NamedTuple

from gradsurgery.unlearn.jobs.stages import NEEDED, TRAINED, parts
from gradsurgery.unlearn.report import plots
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.plots import Records
from gradsurgery.unlearn.report.verdict import (
    Summary,
    compared,
    fractions,
    methods,
    overall,
    ranking,
)

BEST = 4  # methods that stand out in a picture; the others are faint

MARKS = " from Original (square) towards Retrain (star)"
# what is drawn of a run's steps: a key of metrics.jsonl, the label of its axis, a caption
PATHS = (
    (
        "retain_accuracy",
        "accuracy on retained samples",
        f"Paths of the methods{MARKS}, on a part of the "
        "retain set. A path that sinks before it has gone left forgets at the price of what should "
        "stay.",
    ),
    (
        "validation_accuracy",
        "accuracy on validation",
        "The same paths against samples no model was trained on.",
    ),
)
LOSSES = (
    ("forget_loss", "forget loss (nats)", "Mean loss on the forget set: unlearning raises it."),
    (
        "retain_loss",
        "retain loss (nats)",
        "Mean loss on a part of the retain set: it should stay low.",
    ),
)
INSIDE = (  # of OrthoGrad's steps; here a name for each of several lines
    (
        {"cosine_mean": "mean", "cosine_max": "largest"},
        "cosine",
        "Cosine of the forget gradient with the retain samples' gradients. Above zero, climbing "
        "the forget loss as it is would raise that sample's loss as well.",
    ),
    (
        {"conflict_rate": ""},
        "conflict rate",
        "Share of retain samples with a cosine above zero.",
    ),
    (
        {"kept_norm": ""},
        "kept norm",
        "Length of the forget gradient after the projection over its length before: 1 nothing was "
        "removed. 0 also where every forget sample is past the ceiling and none pushes.",
    ),
    ({"rank": ""}, "rank", "Independent directions among the retain gradients of a batch."),
)


class Picture(NamedTuple):
    source: str
    """A data: URI."""
    caption: str
    alt: str


class Gallery(NamedTuple):
    """Pictures below one heading."""

    heading: str
    pictures: list[Picture]
    size: Literal["", "one", "small"] = ""
    note: str = ""


def picture(svg: str, caption: str, alt: str = "") -> Picture:
    data = base64.b64encode(svg.encode()).decode()
    return Picture(f"data:image/svg+xml;base64,{data}", caption, alt or caption)


def of_steps(
    summary: Summary, fraction: float, steps: Records, results: list[dict[str, Any]]
) -> list[Gallery]:
    """What happened during the runs with one share of the retain set, and to single samples."""
    names = methods(summary, fraction)
    best = [place.name for place in ranking(summary, fraction)[:BEST]]
    where = "" if fraction == 1 else f", {percent(fraction)} of the retain set"
    faint = " Faint: the other seeds." if len(summary["seeds"]) > 1 else ""
    which = f"the {len(best)} closest to Retrain" if compared(summary) else f"the first {len(best)}"
    bold = f" Bold: {which}." if len(names) > len(best) else ""
    # models that were given took no steps, and are at no place of a path
    absent = "" if {name for _, name in steps} >= set(NEEDED) else MARKS
    known = {key for lines in steps.values() for line in lines for key in line}
    galleries = [
        Gallery(
            f"{heading}{where}",
            [
                picture(
                    draw(steps, names, best, key, label),
                    f"{caption.replace(absent, '')}{bold}{faint}",
                )
                for key, label, caption in drawn
                if key in known
            ],
        )
        for heading, draw, drawn in (
            ("Forgetting against keeping", plots.tradeoff, PATHS),
            ("Over the steps", plots.curves, LOSSES),
        )
    ]
    galleries.append(_losses(summary, [*TRAINED, *best], where, results))
    inside = next((name for name in names if parts(name).method == "orthograd"), None)
    if inside is not None:
        drawn = [
            picture(plots.surgery(steps, inside, keys, label), f"{caption}{faint}")
            for keys, label, caption in INSIDE
        ]
        galleries.append(Gallery(f"Inside OrthoGrad's steps{where}", drawn))
    return [gallery for gallery in galleries if gallery.pictures]


def _losses(
    summary: Summary, names: list[str], where: str, results: list[dict[str, Any]]
) -> Gallery:
    """Histograms of the first seed."""
    seed = summary["seeds"][0]
    losses = {r["method"]: r["losses"] for r in results if r["seed"] == seed and "losses" in r}
    drawn = [
        picture(
            plots.histogram(losses[name]["forget"], losses[name]["test"], name),
            caption="",
            alt=f"loss histogram, {title(name)}",
        )
        for name in names
        if name in losses
    ]
    unseen = any(losses[name]["test"] for name in names if name in losses)
    note = " A method is done when its two shapes lie to each other as Retrain's do."
    return Gallery(
        f"Losses of the forget set{' and of unseen samples' if unseen else ''}{where}",
        drawn,
        "small",
        f"Seed {seed}.{note if unseen and compared(summary) else ''}",
    )


def sweep(summary: Summary) -> Gallery | None:
    """Over the shares of the retain set, where there are several."""
    order = overall(summary)
    if not order:
        return None
    drawn = picture(
        plots.sweep(summary, order, BEST),
        "Mean gap to Retrain, which has the whole retain set, the lower the better; bars: "
        f"standard error over seeds, of the {BEST} best on average; across: doing nothing and "
        "a second Retrain, where there is one. Gaps under "
        f"{plots.LEAST_GAP} points are drawn there.",
    )
    return Gallery("With fewer samples to keep", [drawn], "one")


def cost(summary: Summary, price: str) -> Gallery:
    """Seconds of the methods with the largest share; `price` says what they mean."""
    shares = fractions(summary) or [1.0]
    names = [place.name for place in ranking(summary, shares[0])]
    line = "Dotted: Retrain. " if "seconds" in summary["columns"].get("retrain", {}) else ""
    drawn = picture(plots.cost(summary["columns"], names), f"{line}{price}")
    return Gallery("Cost", [drawn], "one")
