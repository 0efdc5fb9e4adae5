"""Draws architecture.svg: the way from losses to .grad, and the rooms it passes.

python docs/pictures/architecture.py
"""

import matplotlib.pyplot as plt
import pen
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from pen import BLUE, GREEN, INK, RED, label, save

ROWS, RULE, UPDATE = BLUE, RED, GREEN

# what passes from one room to the next, and the rooms: (x, title, files, color)
ROOMS = (
    (0.0, "add", "passes.py\ncapture/tape.py", INK),
    (2.6, "rows, held", "collect.py\ncapture/held.py", ROWS),
    (5.2, "Gramian", "capture/gramians.py\nops/, kernels/, csrc/", ROWS),
    (7.8, "rule", "surgery/", RULE),
    (10.4, "update", "update.py\ncapture/plane.py", UPDATE),
)
PASSED = ("pairs", "$J$", "$J J^{\\top}$", "$w$")


def room(ax: Axes, x: float, title: str, files: str, color: str) -> None:
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12"}
    ax.add_patch(FancyBboxPatch((x, 0), 1.8, 1.25, fc=color, alpha=0.12, ec="none", **shape))
    ax.add_patch(FancyBboxPatch((x, 0), 1.8, 1.25, fc="none", ec=color, lw=1.3, **shape))
    label(ax, x + 0.9, 0.92, title, color, 14)
    label(ax, x + 0.9, 0.4, files, INK, 8.4)


def arrow(ax: Axes, tail: float, tip: float, text: str) -> None:
    pen.arrow(ax, (tail, 0.62), (tip, 0.62))
    label(ax, (tail + tip) / 2, 0.86, text, size=12)


def main() -> None:
    figure, ax = plt.subplots(figsize=(11, 1.7))
    arrow(ax, -0.95, -0.08, "losses")
    for each in ROOMS:
        room(ax, *each)
    for (x, *_), passed in zip(ROOMS, PASSED, strict=False):
        arrow(ax, x + 1.88, x + 2.52, passed)
    arrow(ax, 12.28, 13.15, "$w^{\\top} J$")
    ax.text(13.2, 0.62, ".grad", color=UPDATE, fontsize=13, ha="left", va="center")
    ax.set(xlim=(-1.05, 13.95), ylim=(-0.1, 1.35))
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    save(figure, __file__)


if __name__ == "__main__":
    main()
