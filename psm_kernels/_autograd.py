"""The one backward of the fused passes, and what they cannot do, as errors, not wrong numbers."""

from __future__ import annotations

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


def with_gradient(value: Tensor, slope: Tensor, query: Tensor, divisor: float = 1) -> Tensor:
    """`value`, (B,) or () of all rows, as a function of `query`, whose gradient slope / divisor,
    (B, D), came with it."""
    if not (query.requires_grad and torch.is_grad_enabled()):
        return value
    return _Known.apply(query, (value, slope), divisor)


class _Known(torch.autograd.Function):
    """Eager path: the dispatcher of a registered op costs more than a small pass."""

    @staticmethod
    def forward(ctx, query, found, divisor):
        value, slope = found  # in a tuple: of an input that is returned autograd makes a view
        remember(ctx, query, slope, divisor, inputs=3)
        return value

    @staticmethod
    def backward(ctx, grad):
        return backward(ctx, grad)


def remember(ctx, query: Tensor, slope: Tensor, divisor: float, *, inputs: int) -> None:
    """What `backward` needs: of an eager Function, and of an operator that torch registers."""
    ctx.save_for_backward(slope)
    ctx.query, ctx.divisor = query, divisor  # its values are not needed: not saved
    ctx.inputs = inputs


def backward(ctx, grad: Tensor, *unused) -> tuple[Tensor | None, ...]:
    """The gradient by `query`, the first of the inputs; multiplied in fp32 before any cast."""
    slope = once(*ctx.saved_tensors, ctx.query)
    grad = grad if ctx.divisor == 1 else grad / ctx.divisor
    gradient = (grad[:, None] if grad.ndim else grad) * slope
    return gradient.to(ctx.query.dtype), *[None] * (ctx.inputs - 1)


def once(gradient: Tensor, query: Tensor) -> Tensor:
    """For a backward: a gradient that depends on `query` in a way that autograd does not know.
    Whoever differentiates it by `query` gets an error; making a graph of it is no mistake yet."""
    return _Once.apply(gradient, query) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, query):
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
