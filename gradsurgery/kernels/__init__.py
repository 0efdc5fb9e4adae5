"""Triton kernels: one file per operator, names and signatures those of `gradsurgery.ops`.

Compiled ahead of time and checked in Triton's interpreter, not yet run on a GPU.
"""
