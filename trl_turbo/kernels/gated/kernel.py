"""The Triton kernels: a piece of a row a program, every tensor read or written once."""

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.row_offset import row_offset

_CUBIC = tl.constexpr(0.044715)
_CUBIC_3 = tl.constexpr(0.134145)  # 3 times that
_ROOT_2 = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _sigmoid(t):
    """The sigmoid of t, and its derivative, without the difference of two numbers near each other."""
    e = tl.exp(-tl.abs(t))
    r = 1.0 / (1.0 + e)
    return tl.where(t >= 0, r, e * r), e * r * r


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative, which costs nothing where it is not used."""
    if ACTIVATION == "silu":
        s, slope = _sigmoid(x)
        return x * s, s + x * slope
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF))
        return x * s, s + x * tl.exp(-0.5 * x * x) * _DENSITY
    else:
        # 0.5 * (1 + tanh(t / 2)) is the sigmoid of t
        s, slope = _sigmoid((x + x * x * x * _CUBIC) * _ROOT_2)
        return x * s, s + x * slope * (x * x * _CUBIC_3 + 1.0) * _ROOT_2


@triton.jit
def _place(n_columns, BLOCK: tl.constexpr):
    """This program's row, its columns [BLOCK], and which of them there are."""
    across = tl.cdiv(n_columns, BLOCK)
    program = tl.program_id(0)
    column = (program % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return program // across, column, column < n_columns


@triton.jit(do_not_specialize=["g_inner", "u_inner", "h_inner"])
def forward_kernel(
    gate_ptr,
    g_inner,
    g_outer,
    g_stride,
    up_ptr,
    u_inner,
    u_outer,
    u_stride,
    h_ptr,
    h_inner,
    h_outer,
    h_stride,
    n_columns,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = act(gate) * up."""
    row, column, inside = _place(n_columns, BLOCK)
    gate = tl.load(gate_ptr + row_offset(row, g_inner, g_outer, g_stride) + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row_offset(row, u_inner, u_outer, u_stride) + column, mask=inside, other=0.0)
    act, _ = activate(gate.to(tl.float32), ACTIVATION)
    h = (act * up.to(tl.float32)).to(gate.dtype)
    tl.store(h_ptr + row_offset(row, h_inner, h_outer, h_stride) + column, h, mask=inside)


@triton.jit(do_not_specialize=["d_inner", "g_inner", "u_inner", "h_inner", "dg_inner", "du_inner"])
def backward_kernel(
    grad_ptr,
    d_inner,
    d_outer,
    d_stride,
    gate_ptr,
    g_inner,
    g_outer,
    g_stride,
    up_ptr,
    u_inner,
    u_outer,
    u_stride,
    h_ptr,
    h_inner,
    h_outer,
    h_stride,
    grad_gate_ptr,
    dg_inner,
    dg_outer,
    dg_stride,
    grad_up_ptr,
    du_inner,
    du_outer,
    du_stride,
    n_columns,
    ACTIVATION: tl.constexpr,
    WITH_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gate and up, which may be written over them, and h again."""
    row, column, inside = _place(n_columns, BLOCK)
    grad = tl.load(grad_ptr + row_offset(row, d_inner, d_outer, d_stride) + column, mask=inside, other=0.0).to(
        tl.float32
    )
    gate = tl.load(gate_ptr + row_offset(row, g_inner, g_outer, g_stride) + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row_offset(row, u_inner, u_outer, u_stride) + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = activate(gate.to(tl.float32), ACTIVATION)
    if WITH_H:
        tl.store(h_ptr + row_offset(row, h_inner, h_outer, h_stride) + column, (act * up).to(gate.dtype), mask=inside)
    grad_gate, grad_up = (grad * up * slope).to(gate.dtype), (grad * act).to(gate.dtype)
    tl.store(grad_gate_ptr + row_offset(row, dg_inner, dg_outer, dg_stride) + column, grad_gate, mask=inside)
    tl.store(grad_up_ptr + row_offset(row, du_inner, du_outer, du_stride) + column, grad_up, mask=inside)
