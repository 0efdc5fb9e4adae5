"""Pictures of a run as SVG, each narrow enough to be read on a phone."""

import io
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED, parts, repeated, stage_name
from gradsurgery.unlearn.methods import ALL, METHODS
from gradsurgery.unlearn.report.labels import PAIRS, percent, title
from gradsurgery.unlearn.report.verdict import Summary, fractions, seeds_of

Records = dict[tuple[int, str], list[dict[str, Any]]]  # steps by (seed, stage)

# with the markers below told apart by color-blind readers too, the first ones by color alone
COLORS = {
    "original": "#7a7f87",
    "retrain": ALL["retrain"].color,
    **{name: kind.color for name, kind in METHODS.items()},
}
OTHER = "#7a7f87"
PAIR_COLORS = (
    "#7a5195",
    "#1f77b4",
    "#2a9d8f",
    "#b5651d",
    "#c2185b",
    "#5d7a1f",
    "#4059ad",
    "#8c564b",
)
SHADES = (COLORS["orthograd"], COLORS["graddiff"])
STARS = ((4, 1), (6, 1))  # of four and six points
# two more stars than there are methods; after them the first ones come again
SHAPES = (*"s*o^DvPX<>hpd", *STARS, *"H8", (8, 1), (3, 1))
MARKERS = {name: SHAPES[k % len(SHAPES)] for k, name in enumerate(COLORS)}
DASHES = ("--", ":", "-.")  # of a method with other options than its first
FAINT = 0.28
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
    "text.parse_math": False,  # a name with two dollars in it is no formula
    "svg.hashsalt": "gradsurgery",  # ids, and so files, that depend on the run alone
}
LONG_LABEL = 24  # characters; of longer ones a legend's columns would reach beyond the picture
LEVELS = 51  # of forgetting, at which it is looked what is left
LEAST_GAP = 0.02  # points; a smaller gap is drawn as this one
GAP_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
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


def color(name: str) -> str:
    method, variant, *_ = parts(name)
    if method == PAIRS and variant:
        return PAIR_COLORS[zlib.crc32(variant.encode()) % len(PAIR_COLORS)]
    return COLORS.get(method, OTHER)


def _style(name: str) -> dict[str, Any]:
    """Color, marker and dashes of a stage; its share of the retain set does not matter."""
    method, variant, *_ = parts(name)
    dashes = DASHES[zlib.crc32(variant.encode()) % len(DASHES)] if variant else "-"
    return {"color": color(name), "marker": MARKERS.get(method, "o"), "ls": dashes}


def _probes(steps: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    probed = [step for step in steps if x in step and y in step]
    return [step[x] for step in probed], [step[y] for step in probed]


class PlainLog(LogFormatter):
    """Numbers for a logarithmic axis, where powers of ten would be formulas, which are off."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _without_powers(axis: Axis) -> None:
    axis.set_major_formatter(PlainLog())
    axis.set_minor_formatter(PlainLog())


def _axes(width: float = 4.7, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _legend(figure: Figure, columns: int = 3) -> None:
    """Below the axes, where it covers no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        fits = max(map(len, labels)) <= LONG_LABEL
        place = {"loc": "outside lower center", "ncols": columns if fits else 1}
        figure.legend(handles, labels, handlelength=1.6, columnspacing=1.2, **place)


def _in_turn(names: list[str], best: list[str]) -> list[str]:
    """Those that stay faint, then the best in their order, which is the legend's."""
    return [*(name for name in names if name not in best), *best]


def _lines(
    axes: Axes, records: Records, name: str, keys: tuple[str, str], best: bool, label: str = ""
) -> list[list[float]]:
    """A stage's path in (x, y), bold for the first seed and faint for others; its end points.

    One that is not among the best is faint, and of its first seed alone.
    """
    ends = []
    for steps in (steps for (_, stage), steps in records.items() if stage == name):
        xs, ys = _probes(steps, *keys)
        bold = best and not ends
        axes.plot(
            xs,
            ys,
            color=color(name),
            ls=_style(name)["ls"],
            lw=1.7 if best else 1.1,
            alpha=0.9 if bold else FAINT,
            label=label if label and bold else "_nolegend_",
            zorder=3 if best else 2,
        )
        ends.append([xs[-1], ys[-1]] if xs else [np.nan, np.nan])
        if not best:
            break
    return ends


@picture
def tradeoff(records: Records, names: list[str], best: list[str], y: str, label: str) -> Figure:
    """Forget accuracy against another accuracy: paths of the methods, Original, Retrain."""
    figure, axes = _axes(4.7, 4.1)
    keys = ("forget_accuracy", y)
    for name in _in_turn(names, best):
        chosen = name in best
        ends = _lines(axes, records, name, keys, chosen)
        xs, ys = ([end[axis] for end in ends] for axis in (0, 1))
        axes.scatter(
            xs,
            ys,
            color=color(name),
            marker=_style(name)["marker"],
            s=60 if chosen else 26,
            alpha=1 if chosen else FAINT,
            edgecolors="white",
            label=title(name) if chosen else "_nolegend_",
            zorder=4 if chosen else 2,
        )
    for name, area in (("original", 60), ("retrain", 170)):
        runs = [steps for (_, method), steps in records.items() if method == name]
        if not runs:
            continue
        ends = [_probes(steps, *keys) for steps in runs]
        last = [[found[axis][-1] for found in ends if found[0]] for axis in (0, 1)]
        style = {"marker": MARKERS[name], "s": area, "edgecolors": "white", "zorder": 5}
        axes.scatter(*last, color=COLORS[name], label=title(name), **style)
    axes.set_xlabel("accuracy on the forget set, labels as trained")
    axes.set_ylabel(label)
    _legend(figure)
    return figure


@picture
def pareto(records: Records, names: list[str]) -> Figure:
    """How much accuracy on unseen samples is left once so much is forgotten: a line a method.

    Args:
        names: of stages, of which all seeds and runs are averaged. A line ends where a half of
            these stopped; Original and Retrain are points.
    """
    figure, axes = _axes(4.7, 4.4)
    paths: dict[str, list[tuple[list[float], list[float]]]] = defaultdict(list)
    for (_, stage), steps in records.items():
        found = _probes(steps, "forget_accuracy", "validation_accuracy")
        if found[0]:
            paths[repeated(stage, 1)[0]].append(found)
    for name in names:
        xs, ys = _kept(paths[name])
        axes.plot(xs, ys, color=color(name), ls=_style(name)["ls"], lw=1.7, label=title(name))
    for name, area in (("original", 60), ("retrain", 170)):
        ends = [(xs[-1], ys[-1]) for xs, ys in paths[name]]
        style = {"marker": MARKERS[name], "s": area, "edgecolors": "white", "zorder": 5}
        axes.scatter(*np.mean(ends, 0), color=COLORS[name], label=title(name), **style)
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("accuracy on the forget set, labels as trained")
    axes.set_ylabel("accuracy on validation samples")
    _legend(figure)
    return figure


def _kept(paths: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """The mean of y where x has first come down to each level that a half of the paths reach."""
    levels = np.linspace(max(xs[0] for xs, _ in paths), 0, LEVELS)
    found: list[list[float]] = [[], []]
    for level in levels:
        reached = [
            next(y for x, y in zip(xs, ys, strict=True) if x <= level)
            for xs, ys in paths
            if min(xs) <= level
        ]
        if 2 * len(reached) < len(paths):
            break
        found[0].append(float(level))
        found[1].append(float(np.mean(reached)))
    return found[0], found[1]


@picture
def curves(records: Records, names: list[str], best: list[str], y: str, label: str) -> Figure:
    """One measured loss over the steps of every method, on a logarithmic axis."""
    figure, axes = _axes(4.7, 4.0)
    for name in _in_turn(names, best):
        _lines(axes, records, name, ("step", y), name in best, title(name))
    axes.set_yscale("log")
    _without_powers(axes.yaxis)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    _legend(figure)
    return figure


@picture
def sweep(summary: Summary, order: list[str], best: int) -> Figure:
    """Mean gap to Retrain against the share of the retain set, a line a method.

    Args:
        order: methods, and variants of them, without fractions; the first `best` stand out.
    """
    columns, shares = summary["columns"], fractions(summary)
    figure, axes = _axes(4.7, 5.0)
    for rank, name in enumerate(order):
        method, variant, *_ = parts(name)
        stages = [stage_name(method, share, variant) for share in shares]
        known = [stage for stage in stages if stage in columns]
        xs = [100 * parts(stage).fraction for stage in known]
        ys = [max(100 * columns[stage]["gap_mean"]["mean"], LEAST_GAP) for stage in known]
        chosen = rank < best
        axes.plot(
            xs,
            ys,
            **_style(name),
            lw=2 if chosen else 1.1,
            ms=7 if chosen else 4.5,
            alpha=1 if chosen else 0.5,
            mec="white",
            mew=0.6,
            zorder=4 if chosen else 2,
            label=title(name),
        )
        if chosen:
            errors = [_error(columns[stage]["gap_mean"]["std"], summary, stage) for stage in known]
            axes.errorbar(xs, ys, errors, color=color(name), fmt="none", lw=1, zorder=3)
    for name, dashes in (("original", "--"), (AGAIN, ":")):
        if name in columns:
            gap = max(100 * columns[name]["gap_mean"]["mean"], LEAST_GAP)
            axes.axhline(gap, color=color(name), lw=1, ls=dashes, label=title(name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([100 * share for share in shares], [percent(share) for share in shares])
    axes.minorticks_off()
    ticks = [tick for tick in GAP_TICKS if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("share of the retain set that the methods had")
    axes.set_ylabel("mean gap to Retrain (points)")
    _legend(figure)
    return figure


def _error(std: float | None, summary: Summary, stage: str) -> float:
    """Standard error of a mean over seeds, in points."""
    return 0.0 if std is None else 100 * std / len(seeds_of(summary, stage)) ** 0.5


@picture
def histogram(forget: list[float], test: list[float], name: str) -> Figure:
    """Share of samples by loss, forget against test if there is any, on a logarithmic axis."""
    figure, axes = _axes(3.6, 2.4)
    bins = np.geomspace(SMALLEST_LOSS, 100, 29).tolist()
    for losses, shade, label in ((test, "#9aa0a8", "test"), (forget, color(name), "forget")):
        if not losses:
            continue
        clipped = np.clip(losses, bins[0], bins[-1])
        weights = np.full(len(clipped), 1 / max(len(clipped), 1))
        axes.hist(clipped, bins, weights=weights, color=shade, alpha=0.65, label=label)
    axes.set_xscale("log")
    _without_powers(axes.xaxis)
    axes.set_title(title(name), loc="left", fontweight="bold")
    axes.set_xlabel("loss of a sample (nats)")
    axes.set_ylabel("share")
    axes.legend(loc="best")
    return figure


@picture
def spectrogram(rows: list[list[int]]) -> Figure:
    """Sound as rows of 0 to 255, high sounds on top, time to the right."""
    figure, axes = _axes(3.6, 1.2)
    axes.imshow(np.clip(rows, 0, 255), cmap="magma", vmin=0, vmax=255, aspect="auto")
    axes.set_axis_off()
    return figure


@picture
def surgery(records: Records, name: str, keys: dict[str, str], label: str) -> Figure:
    """What OrthoGrad's steps saw, in the stage `name`: one line a quantity."""
    figure, axes = _axes(4.7, 3.0)
    stages = [steps for (_, stage), steps in records.items() if stage == name]
    for shade, (key, text) in zip(SHADES, keys.items(), strict=False):
        for index, steps in enumerate(stages):
            axes.plot(
                *_probes(steps, "step", key),
                color=shade,
                lw=1.7,
                alpha=FAINT if index else 0.9,
                label=text if text and not index else "_nolegend_",
            )
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(keys) > 1:
        axes.legend(loc="best")
    return figure


@picture
def cost(columns: dict[str, Any], names: list[str]) -> Figure:
    """Seconds a method took, mean and spread over seeds, Retrain as the line to stay below, where
    its seconds are known."""
    known = [name for name in ("retrain",) if "seconds" in columns.get(name, {})]
    names = [*known, *(name for name in names if name not in TRAINED)]
    figure, axes = _axes(4.7, 0.8 + 0.34 * len(names))
    means = [columns[name]["seconds"]["mean"] for name in names]
    errors = [columns[name]["seconds"]["std"] or 0 for name in names]
    axes.barh(
        [title(name) for name in names],
        means,
        xerr=errors,
        color=[color(name) for name in names],
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
    for name in known:
        axes.axvline(columns[name]["seconds"]["mean"], color=COLORS[name], lw=1, ls=":")
    axes.set_xlim(0, max(m + e for m, e in zip(means, errors, strict=True)) * 1.2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of training, measurements left out")
    return figure
