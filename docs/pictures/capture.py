"""Draws capture.svg: what one backward pass leaves, and the two ways from there to the Gramian.

python docs/pictures/capture.py
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from pen import BLUE, GREEN, INK, RED, arrow, box, label, save

GRADIENT, ACTIVATION, KEPT = RED, BLUE, GREEN


def one_pass(ax: Axes) -> None:
    """Activations forward, their gradients back; both kept where a parameter is."""
    for k in range(2):
        x = 1.15 + 1.75 * k
        box(ax, x, 0.85, 0.75, 1.5, INK)
        label(ax, x + 0.375, 1.6, f"$W_{k + 1}$", INK, 16)
        arrow(ax, (x - 0.95, 2.0), (x - 0.05, 2.0), ACTIVATION)
        arrow(ax, (x + 1.7, 1.2), (x + 0.8, 1.2), GRADIENT)
        label(ax, x - 0.5, 2.3, f"$X_{k + 1}$", ACTIVATION, 16)
        label(ax, x + 1.25, 0.88, f"$P_{k + 1}$", GRADIENT, 16)
        box(ax, x - 0.12, -0.1, 1.0, 0.56, KEPT)
        label(ax, x + 0.38, 0.18, f"$X_{k + 1}, P_{k + 1}$", KEPT, 14)
        ax.plot([x + 0.375] * 2, [0.48, 0.83], color=KEPT, lw=1.2, ls=(0, (4, 3)))
    arrow(ax, (3.7, 2.0), (4.6, 2.0), ACTIVATION)
    label(ax, 4.88, 1.6, "$\\ell_1$\n$\\vdots$\n$\\ell_B$", INK, 14)
    label(
        ax,
        2.45,
        -0.75,
        "one backward pass: the pairs are kept\nwhere a parameter meets samples",
        size=11,
    )


def factored(ax: Axes) -> None:
    """Products of all tokens on either side, multiplied, summed over each block."""
    for x, name, color in ((0.0, "$X X^{\\top}$", ACTIVATION), (2.0, "$P\\,P^{\\top}$", GRADIENT)):
        for i in range(3):
            for j in range(3):
                box(
                    ax,
                    x + 0.5 * j,
                    0.6 + 0.5 * (2 - i),
                    0.5,
                    0.5,
                    color,
                    0.1 + 0.25 * (i == 0 < j - 1),
                )
        for t in range(1, 3):  # the tokens of one block
            lines = {"color": color, "lw": 0.6}
            ax.plot([x + 1 + t / 6] * 2, [1.6, 2.1], **lines)
            ax.plot([x + 1, x + 1.5], [1.6 + t / 6] * 2, **lines)
        label(ax, x + 0.75, 2.4, name, color, 15)
    label(ax, 1.75, 1.35, "$\\circ$", INK, 16)
    label(ax, 3.78, 1.35, "$\\to$", INK, 16)
    gramian(ax, 4.05, 0.93)
    label(ax, 2.4, 0.15, "factored: every block of tokens summed", KEPT, 11)
    label(ax, 2.4, -0.4, "$\\frac{1}{2}\\,(TB)^2\\,(p+d)$", INK, 15)


def direct(ax: Axes) -> None:
    """A slice of every row's plane, multiplied with one another, and forgotten."""
    for k in range(3):
        x, y = 0.28 + 0.4 * k, 0.6 + 0.22 * k
        box(ax, x, y, 1.15, 1.05, INK, 0.06)
        ax.add_patch(
            Rectangle((x, y + 0.36), 1.15, 0.3, facecolor=KEPT, alpha=0.45, edgecolor="none")
        )
    label(ax, 1.28, 2.4, "$G_i = P_i^{\\top} X_i$", INK, 15)
    label(ax, 2.75, 1.35, "$\\to$", INK, 16)
    gramian(ax, 3.05, 0.93)
    label(ax, 1.95, 0.15, "direct: a slice of every row at a time", KEPT, 11)
    label(ax, 1.95, -0.4, "$TB\\,pd+\\frac{1}{2}B^2\\,pd$", INK, 15)


def gramian(ax: Axes, x: float, y: float) -> None:
    """[B, B], the entry of two rows marked."""
    for i in range(3):
        for j in range(3):
            box(
                ax,
                x + 0.28 * j,
                y + 0.28 * (2 - i),
                0.28,
                0.28,
                KEPT,
                0.15 + 0.6 * (i == 0 < j - 1),
            )
    label(ax, x + 0.42, y + 1.1, "$J J^{\\top}$", KEPT, 15)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), width_ratios=[5.3, 5.3, 4.3])
    for ax, draw, width in zip(axes, (one_pass, factored, direct), (5.3, 5.3, 4.3), strict=True):
        draw(ax)
        ax.axis("off")
        ax.set_aspect("equal")
        ax.set(xlim=(-0.1, width - 0.1), ylim=(-1.15, 2.75))
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    save(figure, __file__)


if __name__ == "__main__":
    main()
