"""Embeddings where they are, read a part at a time: tensors, numpy arrays and memory maps."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.rows import unit_rows_and_norms

_PIECE_BYTES = 8 << 20  # of fp32 rows that are prepared at a time
_FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Source:
    """Rows (N, D) of `value`, which is never copied whole, as fp32 rows on a device.

    Raises:
        ValueError: it is no matrix of floating numbers, or has other columns than it should.
    """

    def __init__(self, name: str, value: Any, *, normalize: bool, columns: int | None = None):
        described = value
        if is_array(value):
            if value.dtype.name not in _FLOATS:
                wanted = ", ".join(_FLOATS)
                raise ValueError(f"{name}: got dtype {value.dtype}, wanted one of {wanted}")
            dtype = _FLOATS[value.dtype.name]
            described = torch.empty(value.shape, dtype=dtype, device="meta")
        elif not isinstance(value, Tensor):
            got = type(value).__name__
            raise ValueError(f"{name}: got {got}, wanted a tensor or a numpy array")
        checks.check_matrix(name, described, like="queries", shape=(None, columns))
        self.value, self.normalize = value, normalize
        self.rows, self.columns = described.shape

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Put rows `start` to `stop` into out (stop - start, D) fp32; returns (stop - start,) bool:
        which are not finite and therefore zero there."""
        spoiled = torch.empty(len(out), dtype=torch.bool, device=out.device)
        step = max(1, _PIECE_BYTES // (4 * self.columns))
        for at in range(0, len(out), step):
            part = slice(at, at + step)
            piece = self.value[start + at : min(start + at + step, stop)]
            spoiled[part] = self._prepare(piece, out[part])
        return spoiled

    def gather(self, index: Tensor, out: Tensor) -> Tensor:
        """The same of the rows index (n,), which lies on the CPU."""
        where = index.to(self.value.device) if isinstance(self.value, Tensor) else index.numpy()
        return self._prepare(self.value[where], out)

    def _prepare(self, piece: Any, out: Tensor) -> Tensor:
        if is_array(piece):  # a copy in memory: torch has no arrays that are read-only or swapped
            piece = torch.from_numpy(piece.astype(piece.dtype.newbyteorder("=")))
        out.copy_(piece)
        if self.normalize:
            unit, sizes = unit_rows_and_norms(out, out.dtype)
            out.copy_(unit)
            spoiled = ~sizes[:, 0].isfinite()
        else:
            low, high = out.aminmax(dim=1)
            spoiled = ~(low.isfinite() & high.isfinite())
        if spoiled.any():
            out[spoiled] = 0.0
        return spoiled


def corpus_rows(name: str, value: Any, queries: int, rows: int, *, listed: bool = False) -> Tensor:
    """Row numbers of the corpus as int64 (Q,), or (Q, E) where `listed`, on the CPU; -1 for none.

    Raises:
        ValueError: other shapes, no integers, or rows that the corpus does not have.
    """
    if is_array(value) and value.dtype.kind in "iu":
        value = torch.from_numpy(value.astype("int64"))
    if not isinstance(value, Tensor):
        got = f"dtype {value.dtype}" if is_array(value) else type(value).__name__
        raise ValueError(f"{name}: got {got}, wanted integers in a tensor or a numpy array")
    if value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted integers")
    if value.ndim != 1 + listed or len(value) != queries:
        wanted = f"({queries}, any)" if listed else f"({queries},)"
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {wanted}, as queries")
    value = value.detach().cpu().long()
    wrong = (value < -1) | (value >= rows)
    if wrong.any():
        row = int(wrong.reshape(queries, -1).any(1).nonzero()[0, 0])
        raise ValueError(
            f"{name}: got {int(value[wrong][0])} for query {row}, wanted a row of the corpus, "
            f"0 to {rows - 1}, or -1 for none"
        )
    return value


def is_array(value: Any) -> bool:
    """Whether it is a numpy array; numpy is optional, and nobody has one without importing it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
