"""What a backend must have, and what it may have. CONTRIBUTING.md has the recipe for a new one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels.options import PassOptions, PSMOptions
from psm_kernels.rows import wide

_SLAB = 1 << 20  # similarities held at a time: 4 MB in fp32, near a core's cache
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


class Backend:
    """Runs the operators on tensors that were checked: on one device, contiguous, query and key in
    the bank's dtype, s_pos in the dtype of the sums (fp32, or fp64 for an fp64 bank)."""

    name: str
    what: str  # its line in `python -m psm_kernels`
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    max_dim: int | None = None  # columns that bank_pass takes
    max_topk_dim: int | None = None  # and bank_topk
    max_topk: int | None = None  # slots mined per row
    max_step_topk = -1  # and in psm_step; -1: there is none
    differentiable = False  # autograd itself differentiates bank_pass and weighted_pass

    def unavailable(self) -> str | None:
        """One line that says why it cannot run on this machine."""
        return None

    def notes(self) -> list[str]:
        """Further lines of `python -m psm_kernels`."""
        return []

    def supports(
        self, device: str, dtype: torch.dtype, dim: int, topk: int = 0, *, sums: bool = True
    ) -> str | None:
        """None, or why it cannot run on such a bank; `sums`: bank_pass is wanted of it."""
        most = self.max_dim if sums else self.max_topk_dim
        if self.devices is not None and device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"has no kernel for {dtype}"
        if most is not None and dim > most:
            return f"takes at most {most} columns, not {dim}"
        if self.max_topk is not None and topk > self.max_topk:
            return f"mines at most {self.max_topk} slots per row, not {topk}"
        return self.unavailable()

    # --- what it must have ---

    def bank_pass(
        self,
        query: Tensor,  # (B, D)
        key: Tensor | None,  # (B, D), None when nothing is mined
        bank: Tensor,  # (K, D)
        count: Tensor,  # ()
        s_pos: Tensor,  # (B,)
        options: PassOptions,
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,  # (2,) for "bernoulli"
    ) -> BankPass:
        """See `psm_kernels.ops.bank_pass`."""
        raise NotImplementedError

    def bank_topk(
        self,
        query: Tensor,  # (B, D)
        bank: Tensor,  # (K, D)
        k: int,
        count: Tensor,  # ()
        exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """See `psm_kernels.ops.bank_topk`."""
        raise NotImplementedError

    # --- what it may have ---

    def psm_step(
        self,
        query: Tensor,  # (B, D) of any length and dtype, here alone
        key: Tensor,  # (B, D) as well
        bank: Tensor,  # (K, D)
        count: Tensor,  # ()
        options: PSMOptions,  # negatives="bank", topk <= max_step_topk
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,  # (2,) for "bernoulli"
        row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """PSM in one call: unit rows, mining, sums, the loss in fp32, reduced as the options say,
        and its gradient by `query` (B, D) in fp32, through the normalization; of the rows' losses
        (B,), "none", that of their sum. Attention is the query's own. InfoNCE is topk=0,
        selection="all", hard_weight=0."""
        raise NotImplementedError

    def enqueue(
        self,
        keys: Tensor,  # (B, D) of any float dtype
        labels: Tensor | None,  # (B,) int64
        ids: Tensor | None,  # (B,) int64; negative ones are written as -1
        bank: Tensor,  # (K, D)
        bank_labels: Tensor,  # (K,) int64
        bank_ids: Tensor,  # (K,) int64
        ptr: Tensor,  # ()
        count: Tensor,  # ()
        rng_state: Tensor | None = None,  # (2,)
    ) -> bool:
        """`MemoryBank.enqueue` of a ring in one call: normalize, cast, write, advance. False:
        it has none, and wrote nothing."""
        return False

    def weighted_pass(
        self,
        query: Tensor,  # (B, D)
        bank: Tensor,  # (K, D)
        count: Tensor,  # ()
        temperature: float,
        affine: Tensor,  # (5, B)
        rho: Tensor,  # (K,)
        exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `psm_kernels.weighted.weighted_pass`. This one runs slabs of the bank in plain torch,
        never a (B, K) matrix."""
        alpha, beta, gamma, top, cap = affine[:, :, None]
        total, weight = rho.new_zeros(len(query)), rho.new_zeros(len(query))
        mean = rho.new_zeros(query.shape)
        step = max(1, _SLAB // len(query))
        for start in range(0, len(bank), step):
            rows = bank[start : start + step].to(rho.dtype)
            slots = torch.arange(start, start + len(rows), device=bank.device)
            rows = torch.where((slots < count)[:, None], rows, 0.0)
            seen = exclude.seen(slots, count)  # (B, S) or (1, S)
            similarity = query.to(rho.dtype) @ rows.T  # (B, S)
            # What is not seen may be nearer than the top: its exponential would be infinite.
            pull = torch.exp(torch.where(seen, similarity - top, -torch.inf) / temperature)
            line = alpha + beta * similarity.detach() + rho[start : start + step]
            w = (line + gamma * torch.minimum(pull.detach(), cap)).clamp_min(0)
            w = torch.where(seen, w, 0.0)
            weight += w.sum(1)
            w = w * pull
            total = total + w.sum(1)
            mean.addmm_(w.detach(), rows)
        none = total == 0
        some = torch.where(none, 1.0, total)
        log_sum = top[:, 0] / temperature + torch.where(none, -torch.inf, some.log())
        return log_sum, mean / some.detach()[:, None], weight

    def row_ranges(
        self,
        query: Tensor,  # (B, D)
        bank: Tensor,  # (K, D)
        count: Tensor,  # ()
        temperature: float,
        exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and lowest similarity (B,) of what each row sees: its negative mines it."""
        s_pos = query.new_zeros(len(query), dtype=wide(query))
        options = PassOptions(temperature, topk=1)
        found = self.bank_pass(query, -query, bank, count, s_pos, options, exclude)
        return found.neg_lse, -found.topk_sim[:, 0]
