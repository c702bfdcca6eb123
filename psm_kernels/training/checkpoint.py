"""Checkpoints from which a training goes on as if it had not stopped."""

import io
import os
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from psm_kernels.bank.collectives import rank_and_world

try:
    import numpy as np
except ImportError:  # then there is nothing of numpy's to save
    np = None

_GENERATORS = ("python_rng", "torch_rng", "cuda_rng")
_AS_THEY_ARE = (bool, int, float, str, bytes, type(None), Tensor, nn.Parameter)


def save_checkpoint(path: str | Path, parts: Mapping[str, Any], **more: Any) -> None:
    """Write the states of the parts, of the random number generators, and more by name.

    Every process calls it and the first one writes; divided banks are put together, so that any
    number of processes can go on. The old file stays until the new one is whole. Whatever it
    writes, `load_checkpoint` reads: the rest is refused before anything is written.

    Args:
        path: the file, which torch.load reads as a dict; meanwhile its suffix is .tmp.
        parts: by name, what has a state_dict: networks, losses, optimizers, scalers.
        more: what else to save, such as settings: numbers, strings, tensors, lists and dicts.
            numpy's scalars become numbers, its arrays tensors, paths strings, in the parts too.

    Raises:
        ValueError: a name is taken, or a value is of a type that torch.load refuses to read.
    """
    names = [*_GENERATORS, "numpy_rng", *parts, *more]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: got it for two of generators, parts and more, wanted one")
    state = {name: full_state_dict(part) for name, part in parts.items()} | more
    state = {name: _plain(value, name) for name, value in state.items()}
    if rank_and_world()[0] != 0:
        return
    state |= {"python_rng": random.getstate(), "torch_rng": torch.get_rng_state()}
    state |= {"cuda_rng": torch.cuda.get_rng_state_all()}
    if np is not None:
        state["numpy_rng"] = _plain(np.random.get_state(legacy=False), "numpy_rng")
    temporary = Path(path).with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, parts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that was saved; puts the parts and the random number generators into that state.

    Args:
        path: a file of `save_checkpoint`.
        parts: by name, what goes on; None only reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of something else, or a part does not fit, and why; the
            parts before it then have their new state.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    try:
        # Tensors that nobody asks for are not read: a bank may take gigabytes.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=parts is None)
    except Exception as error:  # of zip, pickle or types: all mean the same
        raise ValueError(f"{path} is damaged or no checkpoint: {_one_line(error)}") from error
    saved = state.keys() if isinstance(state, dict) else ()
    missing = [name for name in (*_GENERATORS, *(parts or ())) if name not in saved]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}, but {', '.join(map(str, saved)) or 'nothing'}"
        )
    for name, part in (parts or {}).items():
        try:
            part.load_state_dict(state[name])
        except Exception as error:  # of keys, shapes or types, whatever the part raises
            raise ValueError(f"{path}: {name} does not fit: {_one_line(error)}") from error
    if parts is not None:
        _restore_generators(state)
    return state


def full_state_dict(module: Any) -> dict[str, Any]:
    """`module.state_dict()` with the DTensors of sharded banks put together, on every rank: all of
    them call it."""
    state = module.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def _restore_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python_rng"])
    torch.set_rng_state(state["torch_rng"])
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    if np is not None and "numpy_rng" in state:  # checkpoints of 0.1 have none
        inner = state["numpy_rng"]["state"].items()
        inner = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in inner}
        np.random.set_state(state["numpy_rng"] | {"state": inner})


def _plain(value: Any, where: str) -> Any:
    """The value in types that torch.load reads without trusting the file."""
    if np is not None and isinstance(value, (np.generic, np.ndarray)) and value.dtype != object:
        value = value.item() if value.ndim == 0 else _tensor(value)
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind in (dict, OrderedDict):
        made = kind(
            (_plain(key, f"a key of {where}"), _plain(item, f"{where}[{key!r}]"))
            for key, item in value.items()
        )
        if kind is OrderedDict:
            vars(made).update(vars(value))  # a module's versions
        return made
    if kind in (list, tuple):
        return kind(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, PurePath):
        return str(value)
    try:
        copy = io.BytesIO()
        torch.save(value, copy)
        copy.seek(0)
        torch.load(copy, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{where}: got {kind.__module__}.{kind.__qualname__}, which torch.load refuses to read "
            "back; wanted numbers, strings, tensors, lists and dicts of them"
        ) from error
    return value


def _tensor(array: Any) -> Any:
    """The array as a tensor; as it is where torch has no such dtype."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # a copy
    except TypeError:
        return array


def _one_line(error: Exception) -> str:
    """Commands show the first line of an error alone."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
