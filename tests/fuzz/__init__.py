"""Attacks: inputs drawn at random, against float64 oracles. Right, or refused by name, never wrong.

`make test` draws a few of each kind, always the same ones; `make fuzz SEEDS=n` draws many more,
anew for each seed. What is found shrinks to an example, which is kept as an ordinary test.
"""
