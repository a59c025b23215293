"""Triton kernels, one file per op: the launcher has the op's name and takes its schema's arguments.

``specialisations.py`` lists what is compiled ahead of time; ``philox.py`` and ``noise.py`` hold the bits of
docs/numerics.md. Everything is launched with ``enable_fp_fusion=False``: a contracted multiply-add would
change the noise.
"""
