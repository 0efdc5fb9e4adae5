"""Draws bench-*.svg and writes the tables of docs/speed.md and README.md, of benchmarks/results.

python docs/pictures/benchmarks.py

Every color has a contrast of 3 or more on white and on #0d1117, and nothing fills the background.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"README.md": ("speed",), "docs/speed.md": ("cpu", "gpu", "rules")}
INK, COLORS = "#76808c", ("#2e9d5b", "#3b82d6", "#d9534f")
RIVALS = ("TorchJD autogram", "vmap(grad) + QR")
PARTS = ("OrthoGrad", *RIVALS)
SAID = {
    "transformer 384x6 T64": "transformer 10.7 M, 64 tokens",
    "transformer 384x6 T196": "transformer 10.7 M, 196 tokens",
    "transformer 768x2 T16": "transformer 14 M, 16 tokens",
    "transformer 768x12 T256": "transformer 85 M, 256 tokens",
    "LoRA 384x6 T64": "LoRA r = 8, 64 tokens",
    "ResNet-18 GN": "ResNet-18, group norm",
    "Llama 3.2 1B's shape, bfloat16, 16 + 16 of 256": "Llama 3.2 1B's shape, bfloat16",
    "LoRA r = 16 on Llama 3.2 1B's shape, bfloat16, 16 + 16 of 256": "LoRA r = 16 on it",
}
Row = tuple[str, list[float | None], float | None, float]  # name, times, memory of plain, ms


def cpu_steps() -> list[Row]:
    """A model, what each step takes in plain steps, the memory in that of plain, plain's ms."""
    rows = []
    # memory as the allocator gives it to who sets nothing
    for bench in _benchmarks("cpu/fresh.json", "bench_orthograd_step["):
        info = bench["extra_info"]
        rivals = info["rivals"]
        if "plain step" not in rivals:
            continue
        plain = rivals["plain step"]["median"]
        times = [bench["stats"]["median"] / plain]
        times += [rivals[r]["median"] / plain if r in rivals else None for r in RIVALS]
        memory = info["memory_ratio"].get("plain step")
        rows.append((_said(bench["param"]), times, memory, 1e3 * plain))
    return rows


def gpu_steps() -> list[Row]:
    """The same on the GPU."""
    newest = max((RESULTS / "nvidia-h200").glob("*.json"))
    found: dict[str, dict[str, Any]] = {}
    for row in json.loads(newest.read_text(encoding="utf-8"))["rows"]:
        kind, _, name = row["work"].partition(", ")
        if kind in ("plain step", "OrthoGrad step", *RIVALS):
            found.setdefault(name, {})[kind] = row
    rows = []
    for name, of in found.items():
        plain = of["plain step"]
        kinds = ("OrthoGrad step", *RIVALS)
        times = [of[kind]["seconds"] / plain["seconds"] if kind in of else None for kind in kinds]
        memory = of["OrthoGrad step"]["extra_bytes"] / plain["extra_bytes"]
        rows.append((_said(name), times, memory, 1e3 * plain["seconds"]))
    return rows


def rules() -> list[tuple[str, float, float]]:
    """A rule and its rows, ms of ours, ms of TorchJD's."""
    benches = _benchmarks("cpu/rules_fresh.json", "bench_weighting[")
    return [
        (
            "{}, {} rows".format(*bench["param"].split("-")),
            1e3 * bench["stats"]["median"],
            1e3 * bench["extra_info"]["rivals"]["torchjd"]["median"],
        )
        for bench in benches
    ]


def _benchmarks(file: str, name: str) -> Iterable[dict[str, Any]]:
    every = json.loads((RESULTS / file).read_text(encoding="utf-8"))["benchmarks"]
    return [bench for bench in every if bench["name"].startswith(name)]


def _said(name: str) -> str:
    return SAID.get(name, re.sub(r"(\d)M$", r"\1 M", name))


def tables() -> dict[str, str]:
    """The tables of the pages by the name between whose marks they stand."""
    steps = {"cpu": cpu_steps(), "gpu": gpu_steps()}
    found = {name: _of_steps("model", rows) for name, rows in steps.items()}
    both = [(f"CPU: {model}", *rest) for model, *rest in steps["cpu"]]
    both += [(f"H200: {model}", *rest) for model, *rest in steps["gpu"]]
    found["speed"] = _of_steps("OrthoGrad's step, 16 + 16 samples", both)
    lines = [["rule", "here, ms", "TorchJD, ms", "times faster"], ["---", *["---:"] * 3]]
    lines += [[n, shown(a), shown(b), shown(b / a, 2)] for n, a, b in _fast_first(rules())]
    found["rules"] = _markdown(lines)
    return found


def _of_steps(head: str, rows: Iterable[Row]) -> str:
    columns = [head, "plain step, ms", *PARTS, "memory"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for model, times, memory, ms in rows:
        cells = ["" if one is None else shown(one) for one in [ms, *times, memory]]
        cells[1] = f"**{cells[1]}**"
        lines.append([model, *cells])
    return _markdown(lines)


def _fast_first(rows: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return sorted(rows, key=lambda row: row[1] / row[2])


def shown(value: float, digits: int = 3) -> str:
    """So many digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.15g}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(
    name: str, rows: list[tuple[str, list[float | None]]], labels: Sequence[str], x: str
) -> None:
    """A line for each row, a dot for each of its values, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "gradsurgery", "font.size": 12})
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.6, 1.3 + 0.34 * len(rows)))
    for place, (_, values) in enumerate(rows):
        there = [value for value in values if value is not None]
        ax.plot([min(there), max(there)], [place, place], color=INK, lw=1, zorder=1)
    for k, label in enumerate(labels):
        dots = [(v[k], place) for place, (_, v) in enumerate(rows) if v[k] is not None]
        ax.scatter(*zip(*dots, strict=True), s=60, color=COLORS[k], label=label, zorder=5 - k)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: shown(value))
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(x, color=INK)
    ax.tick_params(colors=INK, which="both")
    ax.grid(axis="x", color=INK, alpha=0.25)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(INK)
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(labels)}
    ax.legend(frameon=False, labelcolor=INK, handletextpad=0.2, columnspacing=1, **place)
    path = HERE / f"bench-{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    times = "time of a step, in plain training steps"
    for name, rows in (("cpu", cpu_steps()), ("gpu", gpu_steps())):
        draw(name, [(model, found) for model, found, *_ in rows], PARTS, times)
    pairs = [(name, [here, there]) for name, here, there in _fast_first(rules())]
    draw("rules", pairs, ("here", "TorchJD"), "ms for a call")
    found = tables()
    for page, names in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            mark = f"<!-- {name} -->\n"
            before, _, after = text.split(mark)
            text = f"{before}{mark}{found[name]}\n{mark}{after}"
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
