"""The one backward of the fused passes, and what they cannot do, as errors, not wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TWICE = (
    "second derivatives: got a gradient that was computed together with the loss, which cannot be "
    "differentiated again; backend='reference', neither compiled nor sharded, gives one that can"
)
_TRACED = (
    "torch.jit.trace: got a call of psm_kernels, whose kernels it cannot see and would not repeat; "
    "use torch.compile or torch.export"
)
_TRANSFORMED = (
    "torch.func: got a tensor under a transform (vmap, grad, jvp or another), through which the "
    "kernels of psm_kernels cannot see; hand over all rows as one (B, D), reduction='none' keeps "
    "them apart, and use torch.autograd (backend='reference' for second derivatives)"
)
_FORWARD_MODE = (
    "forward-mode AD: got a dual tensor, which psm_kernels has no rule for; use torch.autograd.grad"
)
_AGAIN = (
    "the loss was run again inside backward, as activation checkpointing does: it would see the "
    "next noise and a bank that holds this batch already; leave it out of the checkpointed part"
)


class BankSide(NamedTuple):
    """The gradient by a pass's bank, which takes a pass of its own in the backward."""

    run: Callable[..., Tensor]  # (gradient by the rows (B,), *read) -> (K, D)
    read: tuple[Tensor | None, ...]  # query, bank, and what else the first pass read or gave


def wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def with_gradient(
    value: Tensor, slope: Tensor, query: Tensor, divisor: float = 1, other: BankSide | None = None
) -> Tensor:
    """`value`, (B,) or () of all rows, as a function of `query`, whose gradient slope / divisor,
    (B, D), came with it; with `other` of its bank as well."""
    if other is None and not wants_gradient(query):
        return value
    bank = None if other is None else other.read[1]
    return _Known.apply(query, None, bank, (value, slope), divisor, other)


class _Known(torch.autograd.Function):
    """Eager path: the dispatcher of a registered op costs more than a small pass."""

    @staticmethod
    def forward(ctx, query, key, bank, found, divisor, other):
        value, slope = found  # in a tuple: of an input that is returned autograd makes a view
        remember(ctx, query, slope, divisor, inputs=6, other=other)
        return value

    @staticmethod
    def backward(ctx, grad):
        return backward(ctx, grad)


def remember(
    ctx, query: Tensor, slope: Tensor, divisor: float, *, inputs: int, other: BankSide | None = None
) -> None:
    """What `backward` needs: of an eager Function, and of an operator that torch registers."""
    ctx.other, read = (None, ()) if other is None else other
    ctx.save_for_backward(slope, *read)
    ctx.query, ctx.divisor = query, divisor  # its values are not needed: not saved
    ctx.inputs = inputs


def backward(ctx, grad: Tensor, *unused) -> tuple[Tensor | None, ...]:
    """The gradient by `query`, the first of the inputs, multiplied in fp32 before any cast, and by
    the bank, the third, where it is wanted."""
    gradients = [None] * ctx.inputs
    slope, *read = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        of_rows = grad if ctx.divisor == 1 else grad / ctx.divisor
        of_query = (of_rows[:, None] if grad.ndim else of_rows) * once(slope, ctx.query)
        gradients[0] = of_query.to(ctx.query.dtype)
    if ctx.other is not None and ctx.needs_input_grad[2]:
        with torch.no_grad():
            of_bank = ctx.other(grad, *read)
        gradients[2] = once(of_bank, grad, *read[:2])
    return tuple(gradients)


def once(gradient: Tensor, *of: Tensor) -> Tensor:
    """For a backward: a gradient that depends on tensors in a way that autograd does not know.
    Whoever differentiates it by them gets an error; making a graph of it is no mistake yet."""
    return _Once.apply(gradient, *of) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, *of):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *unused):
        raise RuntimeError(_TWICE)


def refuse_tracing() -> None:
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise RuntimeError(_TRACED)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise a RuntimeError where a kernel would read tensors that are not what they stand for."""
    dual = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():  # vmap and grad end here in eager mode, or in an error
        if dual:
            raise RuntimeError(_FORWARD_MODE)
        return
    if torch._C._is_tracing():
        raise RuntimeError(_TRACED)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if any(x is not None and wrapped(x) for x in tensors):
            raise RuntimeError(_TRANSFORMED)
    if dual and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors if x is not None
    ):
        raise RuntimeError(_FORWARD_MODE)


def refuse_recompute(rng_state: Tensor) -> None:
    """For a forward that moves a state on. A compiled one asks each time it runs, in an operator
    that is said to write `rng_state`, so that nobody leaves it out or runs it at another time."""
    if torch.compiler.is_compiling():
        torch.ops.psm_kernels.refuse_recompute(rng_state)
    else:
        _refuse_recompute(rng_state)


def _refuse_recompute(rng_state: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:  # the autograd engine is at work in this thread
        raise RuntimeError(_AGAIN)


_refuse_recompute_op = torch.library.custom_op(
    "psm_kernels::refuse_recompute", _refuse_recompute, mutates_args={"rng_state"}
)


@_refuse_recompute_op.register_fake
def _(rng_state):
    return None
