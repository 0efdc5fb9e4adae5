"""The model card of an unlearned model."""

from __future__ import annotations

import re
from typing import Any

from gradsurgery import __version__
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.stages import parts
from gradsurgery.unlearn.report.labels import LABELS, percent, title
from gradsurgery.unlearn.training.config import to_dict

WHAT = {
    "mislabeled": "training samples that had been given wrong labels",
    "class": "every training sample of one digit",
    "random": "training samples drawn at random",
}


def plain(value: object) -> str:
    """Text that Markdown shows as it is: no link, no HTML, no cell of a table."""
    return re.sub(r"([\\`*\[\]<>|&~$:@])", r"\\\1", show(value))


def model_card(config: DigitsConfig, summary: dict[str, Any], seed: int, name: str) -> str:
    """Markdown: method, forget set, options, numbers beside Original and Retrain, limits."""
    forgotten = summary["forget_sets"][str(seed)]
    index = summary["seeds"].index(seed)
    columns = ["original", "retrain"] + ([name] if name != "retrain" else [])
    method, _, fraction = parts(name)
    options = to_dict(config.training if name == "retrain" else getattr(config, method))
    digit = "" if forgotten["class"] is None else f" (digit {forgotten['class']})"

    def value(column: str, key: str) -> str:
        entry = summary["columns"][column].get(key)
        return "" if entry is None else f"{entry['values'][index]:.4g}"

    keys = [key for key in LABELS if any(key in summary["columns"][c] for c in columns)]
    rows = "\n".join(
        f"| {LABELS[key]} | {' | '.join(value(column, key) for column in columns)} |"
        for key in keys
    )
    settings = "\n".join(f"| {key} | {plain(setting)} |" for key, setting in options.items())
    return f"""# Digits classifier, unlearned by {plain(title(name))}

A convolutional network of 124,426 parameters for 8 x 8 images of handwritten digits, made by
gradsurgery {__version__}. Load it with

```python
from safetensors.torch import load_file
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN

model = DigitsCNN()
model.load_state_dict(load_file("model.safetensors"))
```

## What was forgotten

- {forgotten["samples"]} {WHAT[config.task]}{digit}, of scikit-learn's digits data set, seed {seed}
- forget set, SHA-256 of its sorted sample indices: `{forgotten["sha256"]}`
- method: {plain(title(name))}, with {percent(fraction)} of the retain set

## Numbers of this model (seed {seed})

| | {" | ".join(plain(title(column)) for column in columns)} |
|---|{"---|" * len(columns)}
{rows}

Accuracies and attack accuracies are shares in [0, 1]. Retrain never saw the forget set: near it is
good, beyond it is not better. summary.json has all seeds and methods.

## Options of {plain(title(name))}

| option | value |
|---|---|
{settings}

## Limits

- Unlearning is approximate: no proof and no certified deletion of the data's influence.
- Privacy was judged by attacks on the model's outputs alone; stronger ones may find more.
- Only the named samples were forgotten, not copies or near copies of them in the retain set.
- The data set is small and clean; nothing here says how the model does on other images.
"""
