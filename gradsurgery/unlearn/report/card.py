"""The model card of an unlearned model."""

from __future__ import annotations

import re

from gradsurgery import __version__
from gradsurgery.text import show
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import JobConfig, Summary
from gradsurgery.unlearn.jobs.stages import parts, trained
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.training.config import to_dict

LIMITS = (
    "Unlearning is approximate: no proof and no certified deletion of the data's influence.",
    "Privacy was judged by attacks on the model's outputs alone; stronger ones may find more.",
    "Only the named samples were forgotten, not copies or near copies of them in the retain set.",
)


def plain(value: object, limit: int = 200) -> str:
    """Text that Markdown shows as it is: no link, no HTML, no cell of a table."""
    return re.sub(r"([\\`*\[\]<>|&~$:@])", r"\\\1", show(value, limit))


def fenced(code: str) -> str:
    """Python as a block that nothing in it can end."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{code}\n{fence}"


def model_card(config: JobConfig, summary: Summary, seed: int, name: str) -> str:
    """Markdown: method, forget set, options, numbers beside Original and, where there is one,
    Retrain, limits."""
    job = registry.find(summary["job"])
    forgotten = summary["forget_sets"][str(seed)]
    texts = job.texts({**summary, "seeds": [seed], "forget_sets": {str(seed): forgotten}})
    index = summary["seeds"].index(seed)
    columns = [*dict.fromkeys((*trained(summary["columns"]), name))]
    method, _, fraction, _ = parts(name)
    options = to_dict(config.training if name == "retrain" else getattr(config, method))

    def value(column: str, key: str) -> str:
        entry = summary["columns"][column].get(key)
        return "" if entry is None else f"{entry['values'][index]:.4g}"

    rows = "\n".join(
        f"| {metric.title} | {' | '.join(value(column, metric.key) for column in columns)} |"
        for metric in job.metrics
        if any(metric.key in summary["columns"][column] for column in columns)
    )
    settings = "\n".join(
        f"| {key} | {plain('none' if setting is None else setting)} |"
        for key, setting in options.items()
    )
    doubts = [plain(texts.doubts, 2000)] if texts.doubts else []
    limits = "\n".join(f"- {limit}" for limit in (*LIMITS, *doubts))
    aim = "No model that never saw the forget set was given to compare with."
    if "retrain" in columns:
        aim = "Retrain never saw the forget set: near it is good, beyond it is not\nbetter."
    return f"""# {plain(texts.card_title)}, unlearned by {plain(title(name))}

{plain(texts.model, 2000)}, made by gradsurgery {__version__}. Load it with

{fenced(texts.loading)}

## What was forgotten

- {plain(texts.forgotten, 2000)}, seed {seed}
- forget set, SHA-256 of its sorted sample indices: `{forgotten["sha256"]}`
- method: {plain(title(name))}, with {percent(fraction)} of the retain set

{plain(texts.real, 2000)}

## Numbers of this model (seed {seed})

| | {" | ".join(plain(title(column)) for column in columns)} |
|---|{"---|" * len(columns)}
{rows}

{plain(texts.numbers, 2000)} {aim} summary.json has all seeds and methods.

## Options of {plain(title(name))}

| option | value |
|---|---|
{settings}

## Limits

{limits}
"""
