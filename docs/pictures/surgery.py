"""Draws surgery.svg: what is taken out of a gradient, in two and in three dimensions.

python docs/pictures/surgery.py
"""

import matplotlib.pyplot as plt
import numpy as np
import pen
from matplotlib.axes import Axes
from pen import BLUE, GREEN, INK, RED, save

FORGET, RETAIN, KEPT = RED, BLUE, GREEN
# how x, y and z of the right panel lie on the page
VIEW = np.array([[1.0, 0.0], [0.46, 0.46], [0.0, 1.0]])


def arrow(ax: Axes, tip: np.ndarray, color: str) -> None:
    pen.arrow(ax, (0, 0), tuple(tip), color, width=2.2, head=16)


def dashed(ax: Axes, *points: np.ndarray, color: str = INK) -> None:
    ax.plot(*np.array(points).T, color=color, lw=1.2, ls=(0, (4, 3)))


def right_angle(ax: Axes, at: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
    ax.plot(*np.array([at + u, at + u + v, at + v]).T, color=INK, lw=1.2)


def label(ax: Axes, at: np.ndarray, text: str, color: str = INK, size: float = 15) -> None:
    pen.label(ax, *at, text, color, size)


def two_gradients(ax: Axes) -> None:
    """A forget gradient that opposes the retain gradient, and its projection off it."""
    f, r = np.array([-1.15, 1.25]), np.array([2.0, 0.0])
    along = r * (f @ r) / (r @ r)
    kept = f - along
    ax.plot([-1.75, 2.25], [0, 0], color=INK, lw=0.8, alpha=0.5)
    dashed(ax, f, kept)
    dashed(ax, f, along)
    right_angle(ax, np.zeros(2), np.array([0.13, 0]), np.array([0, 0.13]))
    arrow(ax, r, RETAIN)
    arrow(ax, f, FORGET)
    arrow(ax, kept, KEPT)
    label(ax, r + np.array([-0.05, -0.22]), "$r$", RETAIN)
    label(ax, f + np.array([-0.14, 0.12]), "$f$", FORGET)
    label(ax, kept + np.array([0.72, 0.1]), r"$f-\frac{f\cdot r}{|r|^2}\,r$", KEPT, 16)
    label(
        ax,
        np.array([0.3, -0.85]),
        "harmonize: two gradients that conflict,\n$f\\cdot r<0$; $f$ loses what opposes $r$",
        size=11.5,
    )


def span_of_rows(ax: Axes) -> None:
    """A forget gradient, the plane of retain gradients, and what is orthogonal to all of them."""
    corners = np.array([[-1.3, -1.1, 0], [1.75, -1.1, 0], [1.75, 1.25, 0], [-1.3, 1.25, 0]]) @ VIEW
    ax.fill(*corners.T, facecolor=RETAIN, alpha=0.13, edgecolor="none")
    ax.fill(*corners.T, facecolor="none", edgecolor=RETAIN, alpha=0.6, lw=1)
    g = np.array([0.85, 0.55, 1.25])
    shadow, kept = g * [1, 1, 0], g * [0, 0, 1]
    dashed(ax, g @ VIEW, shadow @ VIEW)
    dashed(ax, g @ VIEW, kept @ VIEW)
    dashed(ax, np.zeros(2), shadow @ VIEW, color=FORGET)
    across = shadow / np.linalg.norm(shadow) * 0.16
    right_angle(ax, np.zeros(2), across @ VIEW, np.array([0, 0.16]))
    rows = np.array([[1.35, -0.35, 0], [0.3, -0.75, 0], [-1.0, 0.2, 0]]) @ VIEW
    beside = np.array([[0.02, -0.16], [0.2, 0.0], [0.02, 0.17]])
    for k, (tip, offset) in enumerate(zip(rows, beside, strict=True), 1):
        arrow(ax, tip, RETAIN)
        label(ax, tip + offset, f"$g_{k}$", RETAIN)
    arrow(ax, g @ VIEW, FORGET)
    arrow(ax, kept @ VIEW, KEPT)
    label(ax, g @ VIEW + np.array([0.17, 0.1]), "$g_u$", FORGET)
    label(ax, kept @ VIEW + np.array([-0.2, 0.06]), r"$g_\perp$", KEPT, 16)
    label(
        ax,
        np.array([0.35, -0.95]),
        "OrthoGrad: the forget gradient $g_u$ loses its\n"
        "part in the span of all retain gradients $g_i$",
        size=11.5,
    )


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), width_ratios=[1, 1.05])
    two_gradients(left)
    span_of_rows(right)
    for ax, box in ((left, (-1.85, 2.4, -1.05, 1.55)), (right, (-1.95, 2.5, -1.18, 1.65))):
        ax.axis("off")
        ax.set_aspect("equal")
        ax.set(xlim=box[:2], ylim=box[2:])
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    save(figure, __file__)


if __name__ == "__main__":
    main()
