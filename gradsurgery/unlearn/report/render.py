"""report.html: one self-contained page, the verdict first, pictures next, settings last."""

from collections.abc import Sequence
from html import escape
from typing import Any

from gradsurgery.unlearn.jobs.stages import TRAINED, parts
from gradsurgery.unlearn.jobs.tune import winner
from gradsurgery.unlearn.metrics.statistics import spread
from gradsurgery.unlearn.report import plots
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.page import (
    best_of,
    facts,
    figure,
    joined,
    numbers,
    page,
    sweep,
    verdict,
)
from gradsurgery.unlearn.report.verdict import Summary, fractions, methods, ranking

TITLES = {
    "mislabeled": "Unlearning mislabeled digits",
    "class": "Unlearning one digit",
    "random": "Unlearning random digits",
}
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


def render(
    summary: Summary,
    config: dict[str, Any],
    environment: dict[str, Any],
    records: list[dict[str, Any]],
    results: list[dict[str, Any]],
    tuning: list[dict[str, Any]],
) -> str:
    """The page, from what the files of a run directory hold."""
    task, seeds = summary["task"], summary["seeds"]
    forget = summary["forget_sets"][str(seeds[0])]
    shares = fractions(summary)
    names = sorted({parts(name).method for name in summary["columns"]} - set(TRAINED))
    body = f"""
<h1>{TITLES[task]}</h1>
<p class="soft">{escape(asked(summary))}</p>
{verdict(summary)}
{figures(summary)}
<h2>The numbers</h2>
{numbers(summary)}
{sweep(summary)}
{"".join(pictures(summary, share, plots.by_stage(records), results) for share in shares[:1])}
{"".join(folded(summary, share, plots.by_stage(records), results) for share in shares[1:])}
{cost(summary)}
<h2>What is real, and what these numbers cannot say</h2>
<p>{REAL}{REAL_TASK[task]}</p>
<p>{not_measured([summary])}</p>
<h2>Settings</h2>
{searched(tuning)}
{settings(config, names)}
<h3>Environment</h3>
{facts({**environment, "packages": joined(environment["packages"])})}
<p class="note">Forget set of seed {escape(str(seeds[0]))}, SHA-256 of its sorted sample indices:
<code style="overflow-wrap: anywhere">{escape(forget["sha256"])}</code></p>
"""
    return page(TITLES[task], body)


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


def asked(summary: Summary) -> str:
    """What had to be forgotten and what could be used."""
    seeds, sets = summary["seeds"], list(summary["forget_sets"].values())
    samples = sorted({entry["samples"] for entry in sets})
    size = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    digits = sorted({entry["class"] for entry in sets if entry["class"] is not None})
    what = {
        "mislabeled": f"{size} training samples with wrong labels",
        "class": f"every training sample of digit {', '.join(map(str, digits))} ({size} samples"
        + (", one digit a seed)" if len(digits) > 1 else ")"),
        "random": f"{size} training samples drawn at random",
    }[summary["task"]]
    runs = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed, so no spread"
    shares = fractions(summary)
    given = ""
    if shares not in ([], [1.0]):
        *most, last = map(percent, shares)
        some = f"{', '.join(most)} or {last}" if most else last
        given = f" The methods had {some} of what to keep."
    return f"To forget: {what}. To keep: everything else.{given} {runs[0].upper()}{runs[1:]}."


def figures(summary: Summary) -> str:
    """The best method in a few large figures."""
    columns, shares = summary["columns"], fractions(summary)
    if not shares:
        return ""
    best = ranking(summary, shares[0])[0].name
    shown = {
        "mislabeled": ("repaired", "forget-set samples given their true label"),
        "class": ("test_forgotten", "of the forgotten digit still recognized on test"),
        "random": ("forget", "accuracy on the forget set"),
    }[summary["task"]]
    cards = [
        shown,
        ("retain", "accuracy on the retain set"),
        ("test", "accuracy on test" + (", other digits" if summary["task"] == "class" else "")),
        ("mia", "accuracy of a membership attack"),
    ]

    def value(name: str, key: str) -> str:
        return f"{columns[name][key]['mean']:.3f}"

    text = "".join(
        f'<div class="figure"><b>{value(best, key)}</b><span>{label}</span>'
        f"<span>Retrain {value('retrain', key)}, Original {value('original', key)}</span></div>"
        for key, label in cards
        if all(key in columns[name] for name in (best, *TRAINED))
    )
    return f'<p class="note">{escape(title(best))}:</p><div class="figures">{text}</div>'


def folded(
    summary: Summary, fraction: float, steps: plots.Records, results: list[dict[str, Any]]
) -> str:
    inside = pictures(summary, fraction, steps, results)
    what = f"Pictures with {percent(fraction)} of the retain set"
    return f"<details><summary>{escape(what)}</summary>{inside}</details>"


def pictures(
    summary: Summary,
    fraction: float,
    steps: plots.Records,
    results: list[dict[str, Any]],
) -> str:
    """Figures of one share of the retain set, with captions that say what to look for."""
    first = summary["seeds"][0]
    losses = {r["method"]: r["losses"] for r in results if r["seed"] == first and "losses" in r}
    names, best = methods(summary, fraction), best_of(summary, fraction)
    seeds = " Faint: the other seeds." if len(summary["seeds"]) > 1 else ""
    others = f" Bold: the {len(best)} closest to Retrain." if len(names) > len(best) else ""
    where = "" if fraction == 1 else f", {percent(fraction)} of the retain set"
    page = f"<h2>Forgetting against keeping{where}</h2><div class='grid'>"
    page += figure(
        plots.tradeoff(steps, names, best, "retain_accuracy", "accuracy on retained samples"),
        "Paths of the methods from Original (square) towards Retrain (star). A path that sinks "
        f"before it has gone left forgets at the price of what should stay.{others}{seeds}",
    )
    page += figure(
        plots.tradeoff(steps, names, best, "validation_accuracy", "accuracy on validation"),
        f"The same paths against samples no model was trained on.{others}{seeds}",
    )
    page += f"</div><h2>Over the steps{where}</h2><div class='grid'>"
    page += figure(
        plots.curves(steps, names, best, "forget_loss", "forget loss (nats)"),
        f"Mean loss on the forget set: unlearning raises it.{others}{seeds}",
    )
    page += figure(
        plots.curves(steps, names, best, "retain_loss", "retain loss (nats)"),
        f"Mean loss on 256 retained samples: it should stay low.{others}{seeds}",
    )
    page += f"</div><h2>Losses of the forget set and of unseen samples{where}</h2>"
    page += "<div class='grid small'>"
    for name in ("original", "retrain", *best):
        if name in losses:
            drawn = plots.histogram(losses[name]["forget"], losses[name]["test"], name)
            page += figure(drawn, "", alt=f"loss histogram, {title(name)}")
    page += (
        "</div><p class='note'>Seed "
        f"{escape(str(first))}. A method is done when its two shapes lie to each other as "
        "Retrain's do.</p>"
    )
    inside = next((name for name in names if parts(name).method == "orthograd"), None)
    return page if inside is None else page + surgery(steps, inside, where, seeds)


def surgery(steps: plots.Records, name: str, where: str, seeds: str) -> str:
    page = f"<h2>Inside OrthoGrad's steps{where}</h2><div class='grid'>"
    page += figure(
        plots.surgery(steps, name, {"cosine_mean": "mean", "cosine_max": "largest"}, "cosine"),
        "Cosine of the forget gradient with the retain samples' gradients. Above zero, "
        f"climbing the forget loss as it is would raise that sample's loss as well.{seeds}",
    )
    page += figure(
        plots.surgery(steps, name, {"conflict_rate": ""}, "conflict rate"),
        f"Share of retain samples with a cosine above zero.{seeds}",
    )
    page += figure(
        plots.surgery(steps, name, {"kept_norm": ""}, "kept norm"),
        "Length of the forget gradient after the projection over its length before: 1 nothing "
        "was removed. 0 also where every forget sample is past the ceiling and none pushes."
        f"{seeds}",
    )
    page += figure(
        plots.surgery(steps, name, {"rank": ""}, "rank"),
        f"Independent directions among the retain gradients of a batch.{seeds}",
    )
    return page + "</div>"


def cost(summary: Summary) -> str:
    shares = fractions(summary) or [1.0]
    names = [place.name for place in ranking(summary, shares[0])]
    drawn = figure(
        plots.cost(summary["columns"], names),
        "Dotted: Retrain. So small a model retrains in seconds: time is no reason to unlearn here.",
    )
    return f"<h2>Cost</h2>{step_cost(summary)}<div class='grid one'>{drawn}</div>"


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


def searched(tuning: list[dict[str, Any]]) -> str:
    """How the options were found, where the run searched for them."""
    if not tuning:
        return ""
    draws = [line["method"] for line in tuning if "final" not in line]
    found = {}
    for name in dict.fromkeys(draws):
        won = winner([line for line in tuning if line["method"] == name])
        found[title(name)] = f"{won['gap']:.4f}" if "gap" in won else "every draw failed"
    return (
        f"<p>Each method's options are the best of {draws.count(draws[0])} random draws on "
        "validation data, on seeds that are not among these. The mean gap to Retrain they had "
        "there:</p>"
        f"<details><summary>Search</summary>{facts(found)}</details>"
    )


def settings(config: dict[str, Any], names: list[str]) -> str:
    """Every option of the run, a folded table a section."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    text = facts({key: joined(value) for key, value in plain.items()})
    for name in ("training", *names):
        if isinstance(config.get(name), dict):
            heading = "Original and Retrain" if name == "training" else title(name)
            inside = facts(config[name])
            text += f"<details><summary>{escape(heading)}</summary>{inside}</details>"
    return text
