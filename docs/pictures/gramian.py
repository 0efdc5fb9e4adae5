"""Draws gramian.svg: long rows, their small Gramian, a rule's weights, and the update.

python docs/pictures/gramian.py
"""

import matplotlib.pyplot as plt
from pen import BLUE, GREEN, RED, arrow, box, label, save

ROWS, GRAM, UPDATE = RED, BLUE, GREEN


def main() -> None:
    figure, ax = plt.subplots(figsize=(9.6, 2.7))
    m, shades = 5, (0.9, 0.55, 0.3, 0.7, 0.45)
    for i in range(m):
        y = 1.2 - 0.34 * i
        box(ax, 0, y, 3.6, 0.26, ROWS)
        box(ax, 6.45, y - 0.02, 0.34, 0.3, UPDATE, shades[i])
        for j in range(m):
            box(ax, 4.4 + 0.3 * j, y, 0.3, 0.28, GRAM, 0.75 if i == j else 0.12 + 0.06 * (i + j))
    box(ax, 7.6, 0.5, 3.6, 0.3, UPDATE, 0.5)
    arrow(ax, (3.7, 0.65), (4.3, 0.65), GRAM)
    arrow(ax, (5.97, 0.65), (6.38, 0.65), UPDATE)
    arrow(ax, (6.88, 0.65), (7.5, 0.65), UPDATE)
    label(ax, 1.8, 1.75, "rows: gradients of samples or tasks", ROWS)
    label(ax, 1.8, -0.5, "J, m rows of millions of values:\nnever formed where they are large")
    label(ax, 5.15, 1.75, "Gramian", GRAM)
    label(ax, 5.15, -0.5, "J Jᵀ, m by m:\nall that a rule sees")
    label(ax, 6.62, 1.75, "weights", UPDATE)
    label(ax, 6.62, -0.4, "w")
    label(ax, 9.4, 1.1, "update", UPDATE)
    label(ax, 9.4, 0.05, "wᵀ J, what .grad gets")
    ax.axis("off")
    ax.set_aspect("equal")
    ax.set(xlim=(-0.1, 11.3), ylim=(-0.95, 2.05))
    figure.subplots_adjust(0, 0, 1, 1)
    save(figure, __file__)


if __name__ == "__main__":
    main()
