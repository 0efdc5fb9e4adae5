"""What the scripts beside it draw with: colors, boxes, arrows, and how a picture is saved.

Every color has a contrast of 3 or more on white and on #0d1117, and nothing fills the background.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "gradsurgery", "font.size": 12, "mathtext.fontset": "cm"})

from matplotlib.axes import Axes  # noqa: E402 - once the backend is chosen
from matplotlib.figure import Figure  # noqa: E402 - likewise
from matplotlib.patches import Rectangle  # noqa: E402 - likewise

INK, RED, BLUE, GREEN = "#76808c", "#d9534f", "#3b82d6", "#2e9d5b"


def box(ax: Axes, x: float, y: float, w: float, h: float, color: str, fill: float = 0.2) -> None:
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, alpha=fill, edgecolor="none"))
    ax.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=color, lw=1.2))


def arrow(
    ax: Axes,
    tail: tuple[float, float],
    tip: tuple[float, float],
    color: str = INK,
    width: float = 1.8,
    head: float = 13,
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=tip, xytext=tail, arrowprops={**style, "mutation_scale": head})


def label(ax: Axes, x: float, y: float, text: str, color: str = INK, size: float = 11) -> None:
    ax.text(x, y, text, color=color, fontsize=size, ha="center", va="center")


def save(figure: Figure, script: str) -> None:
    """Beside the script, under its name."""
    figure.savefig(Path(script).with_suffix(".svg"), transparent=True, metadata={"Date": None})
