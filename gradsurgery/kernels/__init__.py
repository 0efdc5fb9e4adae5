"""Triton kernels: one file per operator, names and signatures those of `gradsurgery.ops`.

Checked in Triton's interpreter, compiled ahead of time, and run on an H200.
"""
