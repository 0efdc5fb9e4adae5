"""Pictures of a run as SVG, each narrow enough to be read on a phone."""

import io
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradsurgery.unlearn.labels import NAMES

Records = dict[tuple[int, str], list[dict[str, Any]]]  # steps by (seed, method)

# from the Okabe-Ito palette, told apart by color-blind readers too
COLORS = {
    "original": "#7a7f87",
    "retrain": "#1b1e23",
    "orthograd": "#0072b2",
    "graddiff": "#d98200",
    "neggrad": "#c4356b",
    "finetune": "#009e73",
}
SHADES = (COLORS["orthograd"], COLORS["graddiff"])
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#3b4048",
    "xtick.color": "#5b616a",
    "ytick.color": "#5b616a",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "gradsurgery",  # ids, and so files, that depend on the run alone
}
SMALLEST_LOSS = 1e-5  # nats; smaller ones fall into the first bin of a histogram


def by_stage(records: list[dict[str, Any]]) -> Records:
    grouped: Records = defaultdict(list)
    for record in records:
        grouped[record["seed"], record["method"]].append(record)
    return dict(grouped)


def picture(draw: Callable[..., Figure]) -> Callable[..., str]:
    """Give a drawing function the house style and make it return SVG text."""

    @wraps(draw)
    def styled(*args: Any, **options: Any) -> str:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **options)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        return buffer.getvalue()

    return styled


def _probes(steps: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    probed = [step for step in steps if x in step and y in step]
    return [step[x] for step in probed], [step[y] for step in probed]


def _axes(width: float = 4.7, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _lines(
    axes: Axes, records: Records, method: str, keys: tuple[str, str], color: str, label: str = ""
) -> list[list[float]]:
    """A method's path in (x, y), bold for the first seed and faint for others; its end points."""
    ends = []
    for steps in (steps for (_, name), steps in records.items() if name == method):
        xs, ys = _probes(steps, *keys)
        named = label if label and not ends else "_nolegend_"
        axes.plot(xs, ys, color=color, lw=1.7, alpha=0.25 if ends else 0.9, label=named)
        ends.append([xs[-1], ys[-1]] if xs else [np.nan, np.nan])
    return ends


@picture
def tradeoff(records: Records, methods: list[str], y: str, label: str) -> Figure:
    """Forget accuracy against another accuracy: paths of the methods, Original, Retrain."""
    figure, axes = _axes()
    keys = ("forget_accuracy", y)
    for name in methods:
        ends = _lines(axes, records, name, keys, COLORS[name])
        style = {"marker": "o", "s": 60, "edgecolors": "white", "zorder": 4}
        axes.scatter(*zip(*ends, strict=True), color=COLORS[name], label=NAMES[name], **style)
    for name, marker, area in (("original", "s", 60), ("retrain", "*", 170)):
        runs = [steps for (_, method), steps in records.items() if method == name]
        last = [[steps[-1][key] for steps in runs] for key in keys]
        style = {"marker": marker, "s": area, "edgecolors": "white", "zorder": 5}
        axes.scatter(*last, color=COLORS[name], label=NAMES[name], **style)
    axes.set_xlabel("accuracy on the forget set, labels as trained")
    axes.set_ylabel(label)
    axes.legend(loc="best")
    return figure


@picture
def curves(records: Records, methods: list[str], y: str, label: str) -> Figure:
    """One measured loss over the steps of every method, on a logarithmic axis."""
    figure, axes = _axes()
    for name in methods:
        _lines(axes, records, name, ("step", y), COLORS[name], NAMES[name])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(loc="best")
    return figure


@picture
def histogram(forget: list[float], test: list[float], name: str) -> Figure:
    """Share of samples by loss, forget against test, on a logarithmic axis."""
    figure, axes = _axes(3.6, 2.4)
    bins = np.geomspace(SMALLEST_LOSS, 100, 29).tolist()
    for losses, color, label in ((test, "#9aa0a8", "test"), (forget, COLORS[name], "forget")):
        clipped = np.clip(losses, bins[0], bins[-1])
        weights = np.full(len(clipped), 1 / max(len(clipped), 1))
        axes.hist(clipped, bins, weights=weights, color=color, alpha=0.65, label=label)
    axes.set_xscale("log")
    axes.set_title(NAMES[name], loc="left", fontweight="bold")
    axes.set_xlabel("loss of a sample (nats)")
    axes.set_ylabel("share")
    axes.legend(loc="best")
    return figure


@picture
def surgery(records: Records, keys: dict[str, str], label: str) -> Figure:
    """What OrthoGrad's steps saw: one line a quantity."""
    figure, axes = _axes(4.7, 3.0)
    for color, (key, name) in zip(SHADES, keys.items(), strict=False):
        _lines(axes, records, "orthograd", ("step", key), color, name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(keys) > 1:
        axes.legend(loc="best")
    return figure


@picture
def cost(columns: dict[str, Any]) -> Figure:
    """Seconds a method took, mean and spread over seeds, Retrain as the line to stay below."""
    names = [name for name in columns if name != "original"]
    figure, axes = _axes(4.7, 0.7 + 0.42 * len(names))
    means = [columns[name]["seconds"]["mean"] for name in names]
    errors = [columns[name]["seconds"]["std"] or 0 for name in names]
    axes.barh(
        [NAMES[name] for name in names],
        means,
        xerr=errors,
        color=[COLORS[name] for name in names],
        ecolor="#9aa0a8",
        height=0.62,
    )
    for row, value in enumerate(means):
        axes.annotate(
            f"{value:.1f} s",
            (value + errors[row], row),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(columns["retrain"]["seconds"]["mean"], color=COLORS["retrain"], lw=1, ls=":")
    axes.set_xlim(0, max(m + e for m, e in zip(means, errors, strict=True)) * 1.2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of training, measurements left out")
    return figure
