"""The pictures of a record as SVG, each narrow enough to be read on a phone."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from gradsurgery.bench.cases import OURS, REFERENCE
from gradsurgery.bench.record import Entry, Record
from gradsurgery.bench.report import duration, size
from gradsurgery.bench.steps import PLAIN, QR, TORCHJD
from gradsurgery.unlearn.report.pictures import Gallery, Picture
from gradsurgery.unlearn.report.pictures import picture as placed
from gradsurgery.unlearn.report.plots import PlainLog, picture

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#2a9d8f", "#7a5195", "#7a7f87"
LOOKS = {  # color and marker of a contender
    OURS: (BLUE, "o"),
    PLAIN: (GRAY, "s"),
    TORCHJD: (ORANGE, "^"),
    "TorchJD": (ORANGE, "^"),
    QR: (GREEN, "D"),
    "torch.linalg.qr": (GREEN, "D"),
    "J @ J.T": (PURPLE, "v"),
    "w @ J": (PURPLE, "v"),
    "Gramian in torch": (PURPLE, "v"),
    REFERENCE: (PURPLE, "v"),
}
OTHER = GRAY, "s"  # reads, the floors of operators
MARKERS = {"gramian": "o", "combine": "^", "project_out": "s"}
INTENSITIES = 0.1, 100.0  # of the roofline, operations a byte


def _axes(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.7, height))
    return figure, figure.subplots()


def _legend(figure: Figure) -> None:
    """Below the axes, where it covers no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2)


def _plain(*axes: Axis) -> None:
    """Numbers on logarithmic axes, no powers of ten."""
    for axis in axes:
        axis.set_major_formatter(PlainLog())
        axis.set_minor_formatter(PlainLog(minor_thresholds=(1.5, 0.5)))


def _contenders(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.extra_info.contenders))


@picture
def dots(values: dict[str, dict[str, float]], label: str, shown: Callable[[float], str]) -> Figure:
    """By work and contender a dot, on a logarithmic axis, and the number beside it."""
    names = list(dict.fromkeys(name for one in values.values() for name in one))
    step = 1 / (len(names) + 0.8)  # of a contender's line; between works is some room
    figure, axes = _axes(1.2 + 0.2 * (len(names) + 0.8) * len(values))
    for k, name in enumerate(names):
        color, marker = LOOKS.get(name, OTHER)
        places = [
            (one[name], row + k * step) for row, one in enumerate(values.values()) if name in one
        ]
        axes.plot(*zip(*places, strict=True), color=color, marker=marker, ls="", label=name)
        for place in places:
            axes.annotate(
                shown(place[0]), place, (6, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks([row + step * (len(names) - 1) / 2 for row in range(len(values))])
    axes.set_yticklabels([_wrapped(work) for work in values])
    axes.set_ylim(len(values) - step, -step)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.35)  # room for the last number
    _plain(axes.xaxis)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    _legend(figure)
    return figure


def _wrapped(work: str) -> str:
    """Over lines, so that dots keep their room."""
    return work.replace(", ", ",\n").replace(" on ", " on\n")


@picture
def lines(entries: list[Entry], axis: str, label: str) -> Figure:
    """Milliseconds along a number that grows, with the middle half of the calls as bars."""
    figure, axes = _axes()
    for name in _contenders(entries):
        found = [
            (entry.extra_info.along[axis], taken)
            for entry in sorted(entries, key=lambda entry: entry.extra_info.along[axis])
            if (taken := entry.extra_info.contenders.get(name)) and taken.seconds
        ]
        if not found:
            continue
        color, marker = LOOKS.get(name, OTHER)
        floor = found[0][1].floor
        axes.errorbar(
            [at for at, _ in found],
            [1e3 * (taken.seconds or 0) for _, taken in found],
            # no farther down than a logarithmic axis goes
            yerr=[
                [1e3 * min(t.spread / 2, 0.5 * (t.seconds or 0)) for _, t in found],
                [1e3 * t.spread / 2 for _, t in found],
            ],
            color=color,
            marker=marker,
            ms=5,
            lw=1.7 if name == OURS else 1.2,
            ls="--" if floor else "-",
            elinewidth=1,
            label=f"{name} (floor)" if floor else name,
            zorder=3 if name == OURS else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({entry.extra_info.along[axis] for entry in entries})
    axes.set_xticks(places, [str(place) for place in places], minor=False)
    _plain(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    _legend(figure)
    return figure


@picture
def roofline(record: Record) -> Figure:
    """Operations a second against operations a byte, below what the machine can do."""
    figure, axes = _axes(3.8)
    machine = record.machine_info
    x = np.geomspace(*INTENSITIES, 200)
    roof = np.minimum(machine.read_gbps * x, machine.matmul_gflops)
    axes.plot(x, roof, color="#3b4048", lw=1.4, label="read, then torch's product")
    for entry in record.group("operators"):
        info = entry.extra_info
        for name, taken in info.contenders.items():
            if taken.floor or not taken.seconds:
                continue
            axes.plot(
                info.operations / info.bytes,
                info.operations / taken.seconds / 1e9,
                marker=MARKERS.get(info.kind, "o"),
                ls="",
                ms=6,
                color=BLUE if name == OURS else LOOKS.get(name, OTHER)[0],
                mfc=BLUE if name == OURS else "none",
                label=f"{info.kind}, {'ours' if name == OURS else name}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes.xaxis, axes.yaxis)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    _legend(figure)
    return figure


def _values(entries: list[Entry], of: str) -> dict[str, dict[str, float]]:
    """By work and contender, seconds or bytes, of those that have them."""

    found = {
        entry.name: {
            name: value
            for name, taken in entry.extra_info.contenders.items()
            if (value := getattr(taken, of))  # a memory of 0 has no place on a logarithmic axis
        }
        for entry in entries
    }
    return {work: one for work, one in found.items() if one}


def galleries(record: Record) -> Iterator[Gallery]:
    """The pictures under their headings, each with what to look for."""
    yield from _of_steps(record)
    yield from _of_operators(record)
    if entries := record.group("rules"):
        times = _values(entries, "seconds")
        times = {work: {n: 1e3 * s for n, s in one.items()} for work, one in times.items()}
        drawn = dots(times, "ms", lambda value: duration(value / 1e3))
        caption = "Time to solve a rule's weights from a Gramian."
        yield Gallery("Rules", [placed(drawn, caption)], "one")


def _of_steps(record: Record) -> Iterator[Gallery]:
    entries = record.group("steps")
    pictures: list[Picture] = []
    if times := _values(entries, "seconds"):
        shares = {
            work: {name: seconds / one[PLAIN] for name, seconds in one.items() if name != PLAIN}
            for work, one in times.items()
            if PLAIN in one
        }
        caption = "A whole step in units of a plain training step on as many samples."
        drawn = dots(shares, "plain steps", "{:.3g}".format)
        pictures.append(placed(drawn, caption))
    if memory := _values(entries, "memory"):
        scaled = {work: {n: b / 2**20 for n, b in one.items()} for work, one in memory.items()}
        caption = "Memory that a step needs beside model, data and optimizer."
        pictures.append(placed(dots(scaled, "MiB", lambda mib: size(round(mib * 2**20))), caption))
    if pictures:
        yield Gallery("Steps: time and memory", pictures)
    grown = record.group("scaling")
    captions = {
        "tokens": "A step, as a sample's tokens grow.",
        "width": "A step, as the model's width grows.",
        "samples": "A step, as the samples to forget grow, and as many to retain.",
    }
    pictures = []
    for axis, caption in captions.items():
        chosen = [entry for entry in grown if axis in entry.extra_info.along]
        if len(chosen) > 1:
            pictures.append(placed(lines(chosen, axis, axis), caption))
    if pictures:
        yield Gallery("Steps as they grow", pictures)


def _of_operators(record: Record) -> Iterator[Gallery]:
    entries = record.group("operators")
    if not entries:
        return
    pictures = []
    for kind in dict.fromkeys(entry.extra_info.kind for entry in entries):
        chosen = [entry for entry in entries if entry.extra_info.kind == kind]
        columns = chosen[0].name.rpartition(" x ")[2]
        if len(chosen) > 1:
            caption = f"{kind} of rows with {columns} columns."
            pictures.append(placed(lines(chosen, "rows", "rows"), caption))
    caption = (
        "Roofline. Filled: ours, hollow: others. The slope is how fast this device reads its "
        "memory, the flat part how fast torch multiplies float32 matrices. Operations are the "
        "fewest that the work asks, whoever does it. Rows that fit into a cache can lie above."
    )
    pictures.append(placed(roofline(record), caption))
    yield Gallery("Operators as rows grow, and beside what the device can do", pictures)
