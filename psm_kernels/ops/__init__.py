"""The two operators. Everything else in the library is a few lines of torch around them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels import backends
from psm_kernels._autograd import once, refuse_transforms

SELECTIONS = ("bernoulli", "expected", "all")
MAX_EXCLUDE = 64  # slots per row: kernels look them up in a short list
EMPTY = -2  # in `bank_ids`: the slot holds nothing, no row sees it


class BankPass(NamedTuple):
    """What a pass over the bank gives, per query. Only `neg_lse` carries a gradient, to `query`:
    once, or in eager mode on backend "reference" as often as one likes."""

    neg_lse: Tensor  # (B,) log sum_j keep exp(s/tau), -inf when nothing is kept
    neg_mean: Tensor  # (B, D) softmax-weighted mean of the kept rows, 0 when none
    neg_sq_lse: Tensor  # (B,) log sum_j keep exp(2 s/tau)
    neg_count: Tensor  # (B,) sum_j keep
    topk_sim: Tensor  # (B, k) similarity to `key`, descending; missing: -inf
    topk_index: Tensor  # (B, k) int64 slots; missing: -1


class Exclude(NamedTuple):
    """Slots that a row must not see, as backends get it: slot j of row i where `slots[i]` names j,
    where bank_ids[j] == ids[i], or where bank_ids[j] is EMPTY."""

    slots: Tensor | None = None  # (B, E) int64; what lies outside [0, K) names nothing
    ids: Tensor | None = None  # (B,) int64; unknown: EMPTY, so that one comparison does
    bank_ids: Tensor | None = None  # (K,) int64; there when `ids` is

    def naming(self, slots: Tensor) -> Exclude:
        """The same with further slots (B, n) named."""
        named = slots if self.slots is None else torch.cat((self.slots, slots), 1)
        return self._replace(slots=named)

    def seen(self, slots: Tensor, count: Tensor) -> Tensor:
        """(B, S) bool, or (1, S) where rows do not differ: which of the slots (S,) a row sees."""
        seen = (slots < count)[None, :]
        for named in () if self.slots is None else self.slots.T:
            seen = seen & (slots != named[:, None])
        if self.bank_ids is not None:
            held = self.bank_ids[slots]
            seen = seen & (held != EMPTY) & (held != self.ids[:, None])
        return seen


NOTHING = Exclude()


def bank_pass(
    query: Tensor,
    key: Tensor | None,
    bank: Tensor,
    count: Tensor | int | None,
    s_pos: Tensor,
    *,
    temperature: float,
    selection: str = "all",
    a: float = 0.5,
    b: float = 0.0,
    topk: int = 0,
    exclude: Tensor | Exclude | None = None,
    exclude_mined: bool = False,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str = "auto",
) -> BankPass:
    """Log-sum-exp over selected bank rows, its gradient, statistics and top-k, never (B, K).

    With s_ij = query_i . bank_j and tau the temperature, a slot j < count is kept with weight
    "bernoulli": 1 with probability p_ij = min(exp(-a (s_ij - s_pos_i - b)^2), 0.999), else 0;
    "expected": p_ij; "all": 1. What is excluded is left out before anything is summed: nothing is
    ever subtracted from a sum that it may dominate.

    Args:
        query: (B, D) unit rows; rounded to the bank's dtype inside, its gradient is not.
        key: (B, D) unit rows that mine the top-k, or None when `topk` is 0.
        bank: (K, D) unit rows, contiguous; fp32, bf16, fp16, or fp64 on "reference".
        count: number of valid slots: 0-d int64 tensor on the bank's device, int, or None for K.
        s_pos: (B,) similarity of each query to its positive.
        temperature: tau > 0.
        selection: "bernoulli" | "expected" | "all".
        a, b: density and offset of p; its peak is at s_pos + b (SimANS, arXiv 2210.11773, eq. 4).
        topk: number of slots to mine; may exceed `count`.
        exclude: (B, E) int64, E <= 64: slots that a row must not see, neither mined nor summed;
            -1 for none, in any order, twice or once.
        exclude_mined: do not sum over the mined slots either. Without it they are summed.
        ids: (B,) int64 names of the samples; a slot that holds a row's own id is excluded as well,
            however many copies there are. Negative: unknown, matches nothing.
        bank_ids: (K,) int64, what the slots hold: -1 unknown, -2 nothing, which no row sees.
        rng_state: int64 (2,) [seed, offset] on the bank's device; needed by "bernoulli" alone.
        row_offset, col_offset: global index of query row 0 and bank slot 0, for the noise.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        BankPass in fp32 (fp64 for an fp64 bank). Ties of the top-k go to the smaller slot.

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
        RuntimeError: under torch.jit.trace, torch.func or forward-mode AD.
    """
    refuse_transforms(query, key, bank, s_pos)
    checks.check_bank(bank)
    _check_queries("query", query, bank)
    batch = query.shape[0]
    checks.check_number("temperature", temperature, above=0)
    checks.check_option("selection", selection, SELECTIONS)
    checks.check_int("topk", topk, 0)
    if topk:
        if key is None:
            raise ValueError("key: got None, wanted a (B, D) tensor, because topk > 0")
        checks.check_matrix("key", key, like="query", shape=query.shape)
        checks.check_device("key", key, bank.device)
    checks.check_vector("s_pos", s_pos, batch)
    checks.check_device("s_pos", s_pos, bank.device)
    checks.check_number("a", a, least=0)
    checks.check_number("b", b)
    checks.check_option("exclude_mined", exclude_mined, (False, True))
    if selection == "bernoulli":
        checks.check_rng_state(rng_state, bank.device)
    args = (
        query,
        key.detach() if topk else None,
        bank.detach(),
        checks.as_count(count, bank),
        s_pos.detach(),
        float(temperature),
        selection,
        float(a),
        float(b),
        topk,
        rng_state if selection == "bernoulli" else None,
        row_offset,
        col_offset,
        backend,
        *excluded(exclude, ids, bank_ids, bank, batch),
        bool(exclude_mined),
    )
    if torch.compiler.is_compiling():
        neg_lse, *rest = torch.ops.psm_kernels.bank_pass(*args)
        return BankPass(neg_lse, *(t.detach() for t in rest))
    swept = BankPass(*_run_bank_pass(*args))
    if swept.neg_lse.requires_grad:  # by autograd itself
        return swept
    return swept._replace(neg_lse=with_gradient(swept.neg_lse, swept.neg_mean, query, temperature))


def differentiable(backend: str, bank: Tensor) -> bool:
    """Whether autograd itself differentiates this backend's passes over `bank`."""
    return getattr(backends.choose(backend, bank), "DIFFERENTIABLE", False)


def seen_query(query: Tensor, bank: Tensor, backend: str) -> Tensor:
    """`query` as a pass reads it: rounded to the bank's dtype, contiguous, and without a gradient
    unless autograd differentiates the pass."""
    rounded = query.detach().to(bank.dtype).contiguous()
    if not (query.requires_grad and torch.is_grad_enabled() and differentiable(backend, bank)):
        return rounded
    wide = torch.promote_types(bank.dtype, torch.float32)
    return rounded.to(wide) + (query - query.detach())  # zero, whose gradient is not rounded


def with_gradient(neg_lse: Tensor, neg_mean: Tensor, query: Tensor, temperature: float) -> Tensor:
    """neg_lse as a function of the query, whose gradient neg_mean / tau came with the pass."""
    if not (query.requires_grad and torch.is_grad_enabled()):
        return neg_lse
    return _Lse.apply(query, neg_lse, neg_mean, temperature)


def check_backend(backend: str, bank: Tensor) -> None:
    """Raise the ValueError that a pass over `bank` would raise for `backend`, before any work."""
    if not torch.compiler.is_compiling():  # the table imports modules, which no graph can hold
        backends.choose(backend, bank)


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
        to the smaller slot. No gradient.

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
    """
    refuse_transforms(query, bank)
    checks.check_bank(bank)
    _check_queries("query", query, bank)
    checks.check_int("k", k, 0)
    args = (
        query.detach(),
        bank.detach(),
        k,
        checks.as_count(count, bank),
        backend,
        *excluded(exclude, ids, bank_ids, bank, query.shape[0]),
    )
    if torch.compiler.is_compiling():
        return torch.ops.psm_kernels.bank_topk(*args)
    return _run_bank_topk(*args)


@torch.no_grad()
def hidden(exclude: Exclude, count: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first `count` slots hold a row's own id (B,), and how many of them hold
    nothing (). Memory O(B + K)."""
    ids, bank_ids = exclude.ids, exclude.bank_ids
    ordered = ids.sort().values  # a slot counts for the first row of its id, where all look it up
    place = torch.searchsorted(ordered, bank_ids).clamp_max(len(ids) - 1)  # (K,)
    valid = torch.arange(len(bank_ids), device=ids.device) < count
    hit = valid & (bank_ids != EMPTY) & (ordered[place] == bank_ids)
    copies = torch.zeros_like(ids).scatter_add_(0, place, hit.long())
    empty = (valid & (bank_ids == EMPTY)).sum()
    return copies[torch.searchsorted(ordered, ids)], empty


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
    own callers hand on an `Exclude`, whose lists may be longer than MAX_EXCLUDE, or a rank's shard
    of ids with that of a bank."""
    if isinstance(exclude, Exclude):
        return exclude
    if exclude is not None:
        checks.check_slots("exclude", exclude, batch, MAX_EXCLUDE)
        checks.check_device("exclude", exclude, bank.device)
    for name, value, size in (("ids", ids, batch), ("bank_ids", bank_ids, bank.shape[0])):
        if value is not None and not hasattr(value, "rows"):
            checks.check_vector(name, value, size, torch.int64)
            checks.check_device(name, value, bank.device)
    if bank_ids is None and ids is not None:
        raise ValueError("bank_ids: got None with ids, wanted a (K,) int64 tensor")
    if bank_ids is not None:
        unknown = torch.full((batch,), EMPTY, device=bank.device)
        ids = unknown if ids is None else torch.where(ids < 0, EMPTY, ids)
    return Exclude(exclude, ids, bank_ids)


def _check_queries(name: str, query: Tensor, bank: Tensor) -> None:
    checks.check_matrix(name, query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_device(name, query, bank.device)


# --- implementation, autograd, registration ------------------------------------------------------


def _run_bank_pass(
    query, key, bank, count, s_pos, temperature, selection, a, b, topk, rng_state, row_offset,
    col_offset, backend, exclude=None, ids=None, bank_ids=None, exclude_mined=False,
) -> tuple[Tensor, ...]:  # fmt: skip
    implementation = backends.choose(backend, bank)
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    with torch.autocast(bank.device.type, enabled=False):
        query = seen_query(query, bank, backend)
        key = None if key is None else key.to(bank.dtype).contiguous()
        s_pos, exclude = s_pos.to(sums).contiguous(), _contiguous(exclude, ids, bank_ids)
        return tuple(
            implementation.bank_pass(
                query, key, bank, count, s_pos, temperature, selection, a, b, topk, rng_state,
                row_offset, col_offset, exclude, exclude_mined,
            )
        )  # fmt: skip


def _contiguous(*exclude: Tensor | None) -> Exclude:
    return Exclude(*(None if value is None else value.contiguous() for value in exclude))


def _run_bank_topk(
    query, bank, k, count, backend, exclude=None, ids=None, bank_ids=None
) -> tuple[Tensor, Tensor]:
    implementation = backends.choose(backend, bank, topk_only=True)
    with torch.no_grad(), torch.autocast(bank.device.type, enabled=False):
        query = query.to(bank.dtype).contiguous()
        exclude = _contiguous(exclude, ids, bank_ids)
        return tuple(implementation.bank_topk(query, bank, k, count, exclude))


def _bank_rows(bank: Tensor, index: Tensor) -> Tensor:
    return bank[index.clamp_min(0)].masked_fill((index < 0)[..., None], 0.0)


def _query_gradient(grad_lse: Tensor, neg_mean: Tensor, temperature: float, dtype: torch.dtype):
    """d neg_lse / d query = neg_mean / tau, multiplied in fp32 before any cast."""
    return (grad_lse[:, None] * neg_mean / temperature).to(dtype)


class _Lse(torch.autograd.Function):
    """Eager path: the dispatcher of a registered op costs more than a small pass."""

    @staticmethod
    def forward(ctx, query, neg_lse, neg_mean, temperature):
        ctx.save_for_backward(neg_mean)
        ctx.query, ctx.temperature = query, temperature  # its values are not needed: not saved
        return neg_lse

    @staticmethod
    def backward(ctx, grad_lse):
        neg_mean = once(*ctx.saved_tensors, ctx.query)
        return _query_gradient(grad_lse, neg_mean, ctx.temperature, ctx.query.dtype), *[None] * 3


_bank_pass_op = torch.library.custom_op(
    "psm_kernels::bank_pass",
    _run_bank_pass,
    mutates_args=(),
    schema="(Tensor query, Tensor? key, Tensor bank, Tensor count, Tensor s_pos, "
    "float temperature, str selection, float a, float b, int topk, Tensor? rng_state, "
    "int row_offset, int col_offset, str backend, Tensor? exclude=None, Tensor? ids=None, "
    "Tensor? bank_ids=None, bool exclude_mined=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_bank_topk_op = torch.library.custom_op(
    "psm_kernels::bank_topk",
    _run_bank_topk,
    mutates_args=(),
    schema="(Tensor query, Tensor bank, int k, Tensor count, str backend, Tensor? exclude=None, "
    "Tensor? ids=None, Tensor? bank_ids=None) -> (Tensor, Tensor)",
)


_bank_rows_op = torch.library.custom_op(
    "psm_kernels::bank_rows",
    _bank_rows,
    mutates_args=(),
    schema="(Tensor bank, Tensor index) -> Tensor",
)
_snapshot_op = torch.library.custom_op(
    "psm_kernels::snapshot", torch.clone, mutates_args=(), schema="(Tensor state) -> Tensor"
)
_snapshot_op.register_fake(torch.empty_like)


@_bank_rows_op.register_fake
def _(bank, index):
    return bank.new_empty((*index.shape, bank.shape[1]))


@_bank_pass_op.register_fake
def _(query, key, bank, count, s_pos, temperature, selection, a, b, topk, *unused):
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    batch, dim = query.shape
    row = [query.new_empty(batch, dtype=sums) for _ in range(3)]
    return (
        row[0],
        query.new_empty((batch, dim), dtype=sums),
        row[1],
        row[2],
        query.new_empty((batch, topk), dtype=sums),
        query.new_empty((batch, topk), dtype=torch.int64),
    )


@_bank_topk_op.register_fake
def _(query, bank, k, *unused):
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=sums), query.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.query, ctx.temperature = inputs[0], inputs[5]


def _op_backward(ctx, grad_lse, *unused):
    neg_mean = once(*ctx.saved_tensors, ctx.query)
    return _query_gradient(grad_lse, neg_mean, ctx.temperature, ctx.query.dtype), *[None] * 17


_bank_pass_op.register_autograd(_op_backward, setup_context=_setup_context)
