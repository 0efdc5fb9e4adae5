"""Triton kernels: one file per operator, named as in `gradsurgery.ops`.

They know nothing above them. Checked in Triton's interpreter, compiled ahead of time, and run on
an H200.
"""
