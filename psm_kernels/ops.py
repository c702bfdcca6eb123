"""The two operators. Everything else in the library is a few lines of torch around them."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels._autograd import (
    BankSide,
    backward,
    refuse_transforms,
    remember,
    wants_gradient,
    with_gradient,
)
from psm_kernels.backends import registry
from psm_kernels.backends.base import EMPTY, NOTHING, BankPass, Exclude
from psm_kernels.options import PassOptions, PSMOptions, takes
from psm_kernels.rows import wide

MAX_EXCLUDE = 64  # slots per row: kernels look them up in a short list


@takes(PassOptions)
def bank_pass(
    query: Tensor,
    key: Tensor | None,
    bank: Tensor,
    count: Tensor | int | None,
    s_pos: Tensor,
    *,
    slot_bias: Tensor | None = None,
    exclude: Tensor | Exclude | None = None,
    exclude_transposed: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    rng_state: Tensor | None = None,
    backend: str = "auto",
    **settings,
) -> BankPass:
    """Log-sum-exp over selected bank rows, its gradient, statistics and top-k, never (B, K).

    With s_ij = query_i . bank_j and tau the temperature, a slot j < count is kept with weight
    "bernoulli": 1 with probability p_ij = min(exp(-a (s_ij - s_pos_i - b)^2), 0.999), else 0;
    "expected": p_ij; "all": 1. What is excluded is left out before anything is summed: nothing is
    ever subtracted from a sum that it may dominate.

    With selection="all" a `bank` that requires a gradient gets one, as `query` does, and neither
    takes a (B, K) matrix: with g_i the gradient by neg_lse_i it is
    sum_i g_i exp(s_ij / tau + bias_j - neg_lse_i) query_i / tau, a pass in the backward whose
    queries are the bank's rows. Slots from `count` on get 0.

    Args:
        query: (B, D) unit rows; rounded to the bank's dtype inside, its gradient is not.
        key: (B, D) unit rows that mine the top-k, or None when `topk` is 0.
        bank: (K, D) unit rows, contiguous; fp32, bf16, fp16, or fp64 on "reference". Its gradient
            is summed in fp32 and has its dtype.
        count: number of valid slots: 0-d int64 tensor on the bank's device, int, or None for K.
        s_pos: (B,) similarity of each query to its positive.
        temperature: tau > 0.
        selection: "bernoulli" | "expected" | "all".
        a, b: density and offset of p; its peak is at s_pos + b (SimANS, arXiv 2210.11773, eq. 4).
        topk: number of slots to mine; may exceed `count`.
        exclude: (B, E) int64, E <= 64: slots that a row must not see, neither mined nor summed;
            -1 for none, in any order, twice or once.
        exclude_mined: do not sum over the mined slots either. Without it they are summed.
        slot_bias: (K,) constants that are added to a slot's logits s_ij / tau, in fp32, of "all"
            alone: log-q of sampled softmax, with its sign. -inf leaves the slot out of sums and
            count; +inf or NaN in a slot that a row sees spoils the row. Mining does not see it.
        exclude_transposed: (K, E) int64, `exclude` seen from the slots: the rows that must not see
            a slot, -1 for none. Needed where `bank` wants a gradient and there are lists; where
            queries and bank are the same rows, which exclude each other, it is `exclude` itself.
        ids: (B,) int64 names of the samples; a slot that holds a row's own id is excluded as well,
            however many copies there are. Negative: unknown, matches nothing.
        bank_ids: (K,) int64, what the slots hold: -1 unknown, -2 nothing, which no row sees.
        rng_state: int64 (2,) [seed, offset] on the bank's device; needed by "bernoulli" alone.
        row_offset, col_offset: global index of query row 0 and bank slot 0, for the noise.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        BankPass in fp32 (fp64 for an fp64 bank). Ties of the top-k go to the smaller slot. Masks
        are the same everywhere; sums have the same bits on the same kind of device, for the order
        of additions depends on how many multiprocessors or threads divide the bank. Of what is
        mined see `bank_topk`.

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
        RuntimeError: under torch.jit.trace, torch.func or forward-mode AD.
    """
    options = PassOptions(**settings)
    refuse_transforms(query, key, bank, s_pos, slot_bias)
    checks.check_bank(bank)
    check_queries("query", query, bank)
    if options.topk:
        if key is None:
            raise ValueError("key: got None, wanted a (B, D) tensor, because topk > 0")
        checks.check_matrix("key", key, like="query", shape=query.shape)
        checks.check_device("key", key, bank.device)
    checks.check_vector("s_pos", s_pos, len(query))
    checks.check_device("s_pos", s_pos, bank.device)
    if options.selection == "bernoulli":
        checks.check_rng_state(rng_state, bank.device)
    count = checks.as_count(count, bank)
    exclude = excluded(exclude, ids, bank_ids, bank, len(query))
    if slot_bias is not None:
        checks.check_vector("slot_bias", slot_bias, len(bank))
        checks.check_device("slot_bias", slot_bias, bank.device)
        if options.selection != "all":
            raise ValueError(
                f"slot_bias: got a tensor with selection={options.selection!r}, wanted 'all'"
            )
        if wants_gradient(slot_bias):
            raise ValueError("slot_bias: got one that requires a gradient, wanted a constant")
    if exclude_transposed is not None:
        checks.check_slots("exclude_transposed", exclude_transposed, len(bank), MAX_EXCLUDE)
        checks.check_device("exclude_transposed", exclude_transposed, bank.device)
    if wants_gradient(bank):
        check_differentiable_bank(options.selection, options.topk, exclude, exclude_transposed)
    rest = (options, exclude, rng_state, backend, slot_bias, exclude_transposed)
    return run_pass(query, key, bank, count, s_pos, *rest)


def bank_topk(
    query: Tensor,
    bank: Tensor,
    k: int,
    *,
    count: Tensor | int | None = None,
    exclude: Tensor | Exclude | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k bank rows most similar to each query, without a (B, K) matrix.

    Args:
        query: (B, D); rounded to the bank's dtype inside.
        bank: (K, D) contiguous.
        k: neighbors wanted; missing ones (k > count) come as -inf and -1.
        count: number of valid slots, None for K.
        exclude, ids, bank_ids: what a row must not find, as in `bank_pass`.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        similarity (B, k) fp32 (fp64 for an fp64 bank), descending, and index (B, k) int64. Ties go
        to the smaller slot. No gradient. On a GPU the similarities are dot products in fp32, but
        where to look for them is decided by products of the tensor cores, whose last bits differ:
        slots nearer to each other than about 1e-7 may come in another choice than on "reference".

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
    """
    checks.check_bank(bank)
    check_queries("query", query, bank)
    checks.check_int("k", k, 0)
    count = checks.as_count(count, bank)
    exclude = excluded(exclude, ids, bank_ids, bank, len(query))
    return run_topk(query, bank, k, count, exclude, backend)


# --- on arguments that were checked: what banks call ---------------------------------------------


def run_pass(
    query: Tensor,
    key: Tensor | None,
    bank: Tensor,
    count: Tensor,
    s_pos: Tensor,
    options: PassOptions,
    exclude: Exclude = NOTHING,
    rng_state: Tensor | None = None,
    backend: str = "auto",
    slot_bias: Tensor | None = None,
    exclude_transposed: Tensor | None = None,
) -> BankPass:
    """See `bank_pass`. A bank whose gradient is not wanted comes detached."""
    refuse_transforms(query, key, bank, s_pos, slot_bias)
    key = key.detach() if options.topk else None
    rng_state = rng_state if options.selection == "bernoulli" else None
    tensors = (query, key, bank, count, s_pos.detach())
    if torch.compiler.is_compiling():
        named = {"exclude": exclude.slots, "ids": exclude.ids, "bank_ids": exclude.bank_ids}
        named |= {"slot_bias": slot_bias, "exclude_transposed": exclude_transposed}
        neg_lse, *rest = torch.ops.psm_kernels.bank_pass(
            *tensors, **vars(options), **named, rng_state=rng_state, backend=backend
        )
        return BankPass(neg_lse, *(t.detach() for t in rest))
    result = _run_pass(*tensors, options, exclude, rng_state, backend, slot_bias)
    if result.neg_lse.requires_grad:  # by autograd itself
        return result
    other = None
    if wants_gradient(bank):
        read = (query, bank, count, result.neg_lse, slot_bias, exclude_transposed, *exclude[1:])
        run = functools.partial(_bank_gradient, options.temperature, backend)
        other = BankSide(run, read)
    tau = options.temperature
    lse = with_gradient(result.neg_lse, result.neg_mean, query, tau, other=other)
    return result._replace(neg_lse=lse)


def check_differentiable_bank(
    selection: str, topk: int, exclude: Exclude, transposed: Tensor | None
) -> None:
    """Raise the ValueError of a pass that cannot be differentiated by its bank."""
    if selection != "all" or topk:
        raise ValueError(
            f"bank: got one that requires a gradient with selection={selection!r}, topk={topk}, "
            "wanted selection='all' and topk=0, or bank.detach()"
        )
    if (exclude.slots is None) != (transposed is None):
        got = "None with" if transposed is None else "lists without"
        raise ValueError(
            f"exclude_transposed: got {got} `exclude` and a bank that requires a gradient, wanted "
            "the lists of both sides, or of neither, or bank.detach()"
        )


def run_topk(
    query: Tensor,
    bank: Tensor,
    k: int,
    count: Tensor,
    exclude: Exclude = NOTHING,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    refuse_transforms(query, bank)
    args = (query.detach(), bank.detach(), k, count, backend, *exclude)
    run = torch.ops.psm_kernels.bank_topk if torch.compiler.is_compiling() else _run_topk
    return run(*args)


def psm_step(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    count: Tensor,
    options: PSMOptions,
    exclude: Exclude = NOTHING,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
    backend: str = "auto",
) -> Tensor | None:
    """PSM's loss, reduced, of query and key (B, D) of any length in one call of the backend; None
    where it has none for these options, and in a graph. `key` carries no gradient."""
    if torch.compiler.is_compiling():  # the table imports modules, which no graph can hold
        return None
    chosen = registry.choose(backend, bank)
    if options.topk > chosen.max_step_topk:
        return None
    refuse_transforms(query, key, bank)
    (rng_state,) = contiguous(rng_state)
    if exclude is not NOTHING:
        exclude = Exclude(*contiguous(*exclude))
    loss, gradient = chosen.psm_step(
        query.detach(), key, bank, count, options, exclude, rng_state, row_offset
    )
    return with_gradient(loss, gradient, query)


def seen_query(query: Tensor, bank: Tensor, differentiable: bool) -> Tensor:
    """`query` as a pass reads it: rounded to the bank's dtype, contiguous, and without a gradient
    unless autograd differentiates the pass."""
    rounded = query.detach().to(bank.dtype).contiguous()
    if not (wants_gradient(query) and differentiable):
        return rounded
    return rounded.to(wide(bank)) + (query - query.detach())  # zero, whose gradient is not rounded


def check_backend(backend: str, bank: Tensor) -> None:
    """Raise the ValueError that a pass over `bank` would raise for `backend`, before any work."""
    if not torch.compiler.is_compiling():
        registry.choose(backend, bank)


def bank_rows(bank: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (B, k, D) of the slots index (B, k), zeros where it is -1.

    Under torch.compile this is an opaque op: the partitioner would read a plain gather again in the
    backward, when the enqueue has overwritten the slots.
    """
    if torch.compiler.is_compiling():
        return torch.ops.psm_kernels.bank_rows(bank, index).to(dtype)
    return _bank_rows(bank, index).to(dtype)


def snapshot(state: Tensor) -> Tensor:
    """The value now of a state that moves on before the backward; opaque for the same reason."""
    return torch.ops.psm_kernels.snapshot(state) if torch.compiler.is_compiling() else state


def excluded(
    exclude: Tensor | Exclude | None,
    ids: Tensor | None,
    bank_ids: Tensor | None,
    bank: Tensor,
    batch: int,
) -> Exclude:
    """What the three arguments say, checked, for `batch` rows of a pass over `bank`. The library's
    own callers hand on an `Exclude`, whose lists may be longer than MAX_EXCLUDE."""
    if isinstance(exclude, Exclude):
        return exclude
    if exclude is not None:
        checks.check_slots("exclude", exclude, batch, MAX_EXCLUDE)
        checks.check_device("exclude", exclude, bank.device)
    for name, value, size in (("ids", ids, batch), ("bank_ids", bank_ids, bank.shape[0])):
        if value is not None:
            checks.check_vector(name, value, size, torch.int64)
            checks.check_device(name, value, bank.device)
    if bank_ids is None:
        if ids is not None:
            raise ValueError("bank_ids: got None with ids, wanted a (K,) int64 tensor")
        return NOTHING if exclude is None else Exclude(exclude)
    return Exclude(exclude, known(ids, batch, bank.device), bank_ids)


def known(ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """`ids` as backends read them: what is unknown is EMPTY."""
    if ids is None:
        return torch.full((batch,), EMPTY, device=device)
    return torch.threshold(ids, -1, EMPTY)  # in one launch


def check_queries(name: str, query: Tensor, bank: Tensor) -> None:
    checks.check_matrix(name, query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_device(name, query, bank.device)


# --- implementation and registration -------------------------------------------------------------


def _run_pass(
    query, key, bank, count, s_pos, options, exclude, rng_state, backend, slot_bias=None
) -> BankPass:
    chosen = registry.choose(backend, bank, options.topk)
    with without_autocast(bank.device.type):
        bank = bank if chosen.differentiable else bank.detach()
        query = seen_query(query, bank, chosen.differentiable)
        key = None if key is None else key.to(bank.dtype).contiguous()
        s_pos = s_pos.to(wide(bank)).contiguous()
        slot_bias = None if slot_bias is None else slot_bias.detach().to(s_pos.dtype).contiguous()
        exclude, (rng_state,) = Exclude(*contiguous(*exclude)), contiguous(rng_state)
        # One that a user wrote may have no bias, and then is asked for none.
        bias = {} if slot_bias is None else {"slot_bias": slot_bias}
        rest = (options, exclude, rng_state)
        return chosen.bank_pass(query, key, bank, count, s_pos, *rest, **bias)


def _bank_gradient(
    temperature: float,
    backend: str,
    grad: Tensor,
    query: Tensor,
    bank: Tensor,
    count: Tensor,
    neg_lse: Tensor,
    slot_bias: Tensor | None = None,
    exclude_transposed: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> Tensor:
    """(K, D): the gradient of sum_i grad_i neg_lse_i by the bank, whose rows are the queries of a
    pass over the queries: their bias is log |grad_i| - neg_lse_i.

    A pass has no negative weights. So there are two, one for each sign of `grad`; each has its
    queries in front and reads no others, so that both together have the products of one, and nobody
    has to ask the device about signs.
    """
    query = seen_query(query, bank, differentiable=False)
    options = PassOptions(temperature)
    bias = torch.where(neg_lse == -torch.inf, -torch.inf, grad.abs().log() - neg_lse)
    exclude = Exclude(None, ids, bank_ids)
    hidden = torch.arange(len(bank), device=bank.device) >= count
    if bank_ids is not None:
        hidden = hidden | (bank_ids == EMPTY)
    shift = 0.0 if slot_bias is None else slot_bias.to(bias.dtype)
    gradient = bias.new_zeros(bank.shape)
    for sign in (1.0, -1.0):
        idle = (sign * grad <= 0) | (bias == -torch.inf)  # NaN is in both
        if bank.device.type == "cpu" and idle.all():
            continue
        order = idle.argsort(stable=True)
        result = _run_pass(
            bank, None, query[order], (~idle).sum(), bias.new_zeros(len(bank)), options,
            exclude.exchanged(order, exclude_transposed), None, backend, bias[order],
        )  # fmt: skip
        scale = torch.exp(result.neg_lse + shift) * (sign / temperature)
        gradient.addcmul_(scale[:, None], result.neg_mean)
    return gradient.masked_fill_(hidden[:, None], 0.0).to(bank.dtype)


def _run_topk(
    query: Tensor,
    bank: Tensor,
    k: int,
    count: Tensor,
    backend: str,
    exclude: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chosen = registry.choose(backend, bank, k, sums=False)
    with without_autocast(bank.device.type):
        query = query.to(bank.dtype).contiguous()
        exclude = Exclude(*contiguous(exclude, ids, bank_ids))
        return chosen.bank_topk(query, bank, k, count, exclude)


def without_autocast(device: str):
    # Turning it off takes 10 us, as long as a small pass, also where it is not on.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """As backends read them, who see addresses alone."""
    return [None if x is None else x.contiguous() for x in tensors]


def _bank_rows(bank: Tensor, index: Tensor) -> Tensor:
    return bank[index.clamp_min(0)].masked_fill((index < 0)[..., None], 0.0)


def _bank_pass(
    query: Tensor,
    key: Tensor | None,
    bank: Tensor,
    count: Tensor,
    s_pos: Tensor,
    temperature: float,
    selection: str,
    a: float,
    b: float,
    topk: int,
    rng_state: Tensor | None,
    row_offset: int,
    col_offset: int,
    backend: str,
    exclude: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    exclude_mined: bool = False,
    slot_bias: Tensor | None = None,
    exclude_transposed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`run_pass` as torch registers it: a schema has no objects."""
    options = PassOptions(temperature, selection, a, b, topk, exclude_mined, row_offset, col_offset)
    rest = (options, Exclude(exclude, ids, bank_ids), rng_state, backend, slot_bias)
    return tuple(_run_pass(query, key, bank, count, s_pos, *rest))


_bank_pass_op = torch.library.custom_op("psm_kernels::bank_pass", _bank_pass, mutates_args=())
_bank_gradient_op = torch.library.custom_op(
    "psm_kernels::bank_gradient", _bank_gradient, mutates_args=()
)
_bank_topk_op = torch.library.custom_op("psm_kernels::bank_topk", _run_topk, mutates_args=())
_bank_rows_op = torch.library.custom_op("psm_kernels::bank_rows", _bank_rows, mutates_args=())
_snapshot_op = torch.library.custom_op(
    "psm_kernels::snapshot", torch.clone, mutates_args=(), schema="(Tensor state) -> Tensor"
)
_snapshot_op.register_fake(torch.empty_like)


@_bank_rows_op.register_fake
def _(bank, index):
    return bank.new_empty((*index.shape, bank.shape[1]))


@_bank_topk_op.register_fake
def _(query, bank, k, *unused):
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=wide(bank)), query.new_empty(shape, dtype=torch.int64)


@_bank_gradient_op.register_fake
def _(temperature, backend, grad, query, bank, *unused):
    return torch.empty_like(bank)


@_bank_pass_op.register_fake
def _(query, key, bank, count, s_pos, temperature, selection, a, b, topk, *unused):
    (batch, dim), sums = query.shape, wide(bank)
    shapes = ((batch,), (batch, dim), (batch,), (batch,), (batch, topk))
    index = query.new_empty((batch, topk), dtype=torch.int64)
    return *(query.new_empty(shape, dtype=sums) for shape in shapes), index


def _setup_context(ctx, inputs, output):
    query, _, bank, count, _, temperature, selection, _, _, topk, *_ = inputs
    backend, slots, ids, bank_ids, _, slot_bias, transposed = inputs[13:]
    neg_lse, neg_mean, *_ = output
    other = None
    if ctx.needs_input_grad[2]:
        check_differentiable_bank(selection, topk, Exclude(slots), transposed)
        run = functools.partial(torch.ops.psm_kernels.bank_gradient, temperature, backend)
        read = (query, bank, count, neg_lse, slot_bias, transposed, ids, bank_ids)
        other = BankSide(run, read)
    remember(ctx, query, neg_mean, temperature, inputs=len(inputs), other=other)


_bank_pass_op.register_autograd(backward, setup_context=_setup_context)
