"""report.html: what it shows of a run, as plain values for its template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import Texts
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, trained
from gradsurgery.unlearn.jobs.tune import winner
from gradsurgery.unlearn.metrics.statistics import spread
from gradsurgery.unlearn.report import pictures, plots, tables
from gradsurgery.unlearn.report.details import details
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.page import page
from gradsurgery.unlearn.report.pictures import Gallery, of_steps
from gradsurgery.unlearn.report.tables import Row
from gradsurgery.unlearn.report.verdict import Summary, compared, fractions, ranking, sentences


class Card(NamedTuple):
    """A large number and the lines below it."""

    value: str
    lines: list[str]


class Share(NamedTuple):
    """The numbers of one share of the retain set."""

    heading: str  # empty where there is no other share
    header: list[str]
    rows: list[Row]  # a stage each
    stages: list[str]
    groups: dict[str, list[Row]]  # a metric each, with a number for each stage


class Search(NamedTuple):
    """How the methods' options were chosen."""

    draws: int  # of each method
    gaps: dict[str, str]  # of the best, by the method's title


class Found(NamedTuple):
    """What a run, or several put side by side, found of one task."""

    texts: Texts
    compared: bool  # with a Retrain
    asked: str
    sentences: list[str]
    shares: list[Share]
    sweep: Gallery | None
    steps: list[Card]
    cost: Gallery


def found(summary: Summary) -> Found:
    texts = registry.find(summary["job"]).texts(summary)
    return Found(
        texts=texts,
        compared=compared(summary),
        asked=asked(summary, texts.forgotten),
        sentences=sentences(summary),
        shares=shares(summary),
        sweep=pictures.sweep(summary),
        steps=step_cost(summary),
        cost=pictures.cost(summary, texts.price),
    )


def render(
    summary: Summary,
    config: dict[str, Any],
    environment: dict[str, Any],
    records: list[dict[str, Any]],
    results: list[dict[str, Any]],
    tuning: list[dict[str, Any]],
) -> str:
    """The page, from what the files of a run directory hold."""
    seed, steps, given = summary["seeds"][0], plots.by_stage(records), fractions(summary)
    best = ranking(summary, given[0])[0].name if given else ""
    this = found(summary)
    return page(
        "report",
        this.texts.title,
        found=this,
        best=best,
        figures=figures(summary, best) if best else [],
        pictures={share: of_steps(summary, share, steps, results) for share in given},
        details=details(seed, tables.stages(summary, (given or [1.0])[0]), results),
        not_measured=not_measured([summary]),
        search=search(tuning),
        options={key: value for key, value in config.items() if not isinstance(value, dict)},
        sections=sections(config, summary),
        data={key: value for key, value in summary.get("data", {}).items() if value != ""},
        environment=environment,
        seed=seed,
        sha256=summary["forget_sets"][str(seed)]["sha256"],
    )


def asked(summary: Summary, forgotten: str) -> str:
    """What had to be forgotten and what could be used."""
    seeds, given = len(summary["seeds"]), fractions(summary)
    some = ""
    if given not in ([], [1.0]):
        *most, last = map(percent, given)
        some = f"{', '.join(most)} or {last}" if most else last
        some = f" The methods had {some} of what to keep."
    runs = f"{seeds} seeds" if seeds > 1 else "One seed, so no spread"
    return f"To forget: {forgotten}. To keep: everything else.{some} {runs}."


def shares(summary: Summary) -> list[Share]:
    """The tables of every share of the retain set, the largest first."""
    given = fractions(summary) or [1.0]
    return [
        Share(
            "" if given == [1.0] else tables.heading(fraction),
            *tables.main_table(summary, fraction),
            tables.stages(summary, fraction),
            tables.full_table(summary, fraction),
        )
        for fraction in given
    ]


def figures(summary: Summary, name: str) -> list[Card]:
    """What the mean gap of a method is made of, beside Retrain, if there is one, and Original."""
    columns = summary["columns"]
    others = [*trained(columns)[1:], "original"]
    cards = []
    for metric in registry.find(summary["job"]).metrics:
        if metric.compared and all(metric.key in columns[each] for each in (name, *others)):
            own, *beside = (tables.cell(columns[each], metric).text for each in (name, *others))
            group = metric.group.lower()
            label = metric.title if metric.title.startswith(group) else f"{group}: {metric.title}"
            lines = [f"{title(other)} {text}" for other, text in zip(others, beside, strict=True)]
            cards.append(Card(own, [label, *lines]))
    return cards


def step_cost(summary: Summary) -> list[Card]:
    """One OrthoGrad step beside one plain training step; nothing where none was timed."""
    if "step" not in summary:
        return []
    seconds = summary["step"]["seconds"]
    pairs = zip(seconds["orthograd"]["values"], seconds["plain"]["values"], strict=True)
    ratios = spread([ours / plain for ours, plain in pairs])

    def card(entry: dict[str, Any], scale: float, unit: str, label: str) -> Card:
        off = [] if entry["std"] is None else [f"± {scale * entry['std']:.2f}{unit}"]
        return Card(f"{scale * entry['mean']:.2f}{unit}", [label, *off])

    return [
        card(seconds["orthograd"], 1000, " ms", "an OrthoGrad step"),
        card(seconds["plain"], 1000, " ms", "a plain training step on the same samples"),
        card(ratios, 1, " times", "as long: the price of the surgery"),
    ]


def not_measured(summaries: Sequence[Summary]) -> str:
    columns = [column for summary in summaries for column in summary["columns"].values()]
    attacked = any("ulira" in column for column in columns)
    missing = "" if attacked else "attacks that train models of their own (shadow models, U-LiRA), "
    return (
        "Unlearning here is approximate: no proof and no certified deletion. Not measured: "
        f"{missing}what later fine-tuning on "
        "other data brings back, the deletion of several forget sets in turn. Peak memory is of "
        "the first steps and of the whole process, so a few MB of it are chance."
    )


def search(tuning: list[dict[str, Any]]) -> Search | None:
    """How the options were found, where the run searched for them."""
    draws = [line["method"] for line in tuning if "final" not in line]
    if not draws:
        return None
    won = {
        name: winner([line for line in tuning if line["method"] == name])
        for name in dict.fromkeys(draws)
    }
    gaps = {
        title(name): f"{line['gap']:.4f}" if "gap" in line else "every draw failed"
        for name, line in won.items()
    }
    return Search(draws.count(draws[0]), gaps)


def sections(config: dict[str, Any], summary: Summary) -> dict[str, dict[str, Any]]:
    """Options of the training and of each method there is, by what they are options of."""
    names = sorted({parts(name).method for name in summary["columns"]} - set(TRAINED))
    made = "seconds" in summary["columns"]["original"]  # where it was not given
    found = {"Original and Retrain": config.get("training")} if made else {}
    found |= {title(name): config.get(name) for name in names}
    return {heading: options for heading, options in found.items() if isinstance(options, dict)}
