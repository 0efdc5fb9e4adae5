"""Draws ranks.svg: how two processes get the Gramian of all rows, none of them having these.

python docs/pictures/ranks.py
"""

import matplotlib.pyplot as plt
from pen import BLUE, GREEN, INK, RED, arrow, box, label, save

FIRST, SECOND, SUM = RED, BLUE, GREEN


def main() -> None:
    figure, ax = plt.subplots(figsize=(9.6, 4.0))
    for k, color in enumerate((FIRST, SECOND)):
        y = 1.75 - 1.75 * k
        label(ax, -0.55, y + 0.4, f"process {k}", color)
        for row in range(2):  # its own rows, in two slices of columns
            for part in range(2):
                box(ax, 0.1 + part * 0.95, y + 0.45 * (1 - row), 0.9, 0.38, color)
        for row in range(4):  # one slice of the rows of all
            of = FIRST if row < 2 else SECOND
            box(ax, 3.5, y + 0.75 - 0.32 * row, 0.9, 0.26, of)
        for to in range(2):
            arrow(ax, (2.05, y + 0.4), (3.4, 2.15 - 1.75 * to), color)
        for i in range(4):
            for j in range(4):
                box(
                    ax, 5.35 + 0.26 * j, y + 0.75 - 0.26 * i, 0.26, 0.26, INK, 0.12 + 0.2 * (i == j)
                )
        arrow(ax, (4.5, y + 0.45), (5.25, y + 0.45))
        arrow(ax, (6.5, y + 0.45), (7.25, 1.35 if k == 0 else 1.1))
    for i in range(4):
        for j in range(4):
            box(ax, 7.35 + 0.26 * j, 1.6 - 0.26 * i, 0.26, 0.26, SUM, 0.2 + 0.3 * (i == j))
    below = -0.75
    label(ax, 1.0, below, "1. rows of its\nown samples")
    label(ax, 2.75, below, "columns are\ndealt out")
    label(ax, 3.95, below, "2. all rows,\nsome columns")
    label(ax, 5.87, below, "a part of\nthe Gramian")
    label(ax, 7.87, below, "summed:\nthe Gramian", SUM)
    label(ax, 7.87, 0.25, "3. rule: weights", SUM)
    arrow(ax, (7.87, 0.75), (7.87, 0.42), SUM)
    ax.axis("off")
    ax.set_aspect("equal")
    ax.set(xlim=(-1.1, 8.7), ylim=(-1.1, 3.0))
    figure.subplots_adjust(0, 0, 1, 1)
    save(figure, __file__)


if __name__ == "__main__":
    main()
