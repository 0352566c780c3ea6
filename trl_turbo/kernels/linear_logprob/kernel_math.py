"""Constants and exponentials that the Triton kernels share."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Stands for -inf where it is multiplied by e = 0
FLOOR = tl.constexpr(-1e30)
# How far a guessed maximum may be off: squares of exp(30) still sum far below float32's 3e38
REACH = tl.constexpr(30.0)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_F = tl.constexpr(1.44269502162933349609375)  # log2(e) in float32, and the rest of it
LOG2E_REST = tl.constexpr(1.92596299112661746887e-8)
LN2 = tl.constexpr(0.6931471805599453)
# NVIDIA's own instruction, where there is a compiler for it (not in the interpreter, not on AMD)
PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"))


@triton.jit
def exp2(x):
    """2^x, results below 1.2e-38 as 0: `tl.exp2` keeps those by a test and two products around each MUFU.EX2."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def exp(x):
    """e^x with what x log2(e) loses to rounding put back: at x = -20 that is 1e-6 of the result."""
    t = x * LOG2E
    lost = tl.fma(x, LOG2E_F, -t) + x * LOG2E_REST
    return tl.where(t > -125.0, exp2(t) * (1.0 + lost * LN2), exp2(t))


@triton.jit
def capped(x, logit_scale, softcap, inv_temperature):
    """z under a softcap, tanh by way of the sigmoid."""
    return softcap * (2 * tl.sigmoid(2 * x * logit_scale / softcap) - 1) * inv_temperature
