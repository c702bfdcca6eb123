"""Checkpoints from which a training goes on as if it had not stopped."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from psm_kernels.distributed import rank_and_world


def save_checkpoint(path: str | Path, parts: Mapping[str, Any], **facts: Any) -> None:
    """Write the states of the parts, of the random number generators, and the facts.

    Every process calls it and the first one writes; divided banks are put together, so that any
    number of processes can go on. The old file stays until the new one is whole.

    Args:
        path: the file, which torch.load reads as a dict; meanwhile its suffix is .tmp.
        parts: by name, what has a state_dict: networks, losses, optimizers, scalers.
        facts: more to save by name, such as settings: numbers, strings, lists and dicts.
    """
    state = {name: full_state_dict(part) for name, part in parts.items()}
    if rank_and_world()[0] != 0:
        return
    state |= {"python_rng": random.getstate(), "torch_rng": torch.get_rng_state()}
    state |= {"cuda_rng": torch.cuda.get_rng_state_all(), **facts}
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
        ValueError: the file is damaged or of something else, or a part does not fit; the parts
            before it then have their new state.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    try:
        # Tensors that nobody asks for are not read: a bank may take gigabytes.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=parts is None)
        for name, part in (parts or {}).items():
            part.load_state_dict(state[name])
        python, default, cuda = (state[f"{name}_rng"] for name in ("python", "torch", "cuda"))
        if parts is not None:
            random.setstate(python)
            torch.set_rng_state(default)
            if len(cuda) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(cuda)
    except Exception as error:  # of zip, pickle, keys, types or shapes: all mean the same
        raise ValueError(f"{path} is damaged, or not a checkpoint of these parts") from error
    return state


def full_state_dict(module: Any) -> dict[str, Any]:
    """`module.state_dict()` with the DTensors of sharded banks put together, on every rank: all of
    them call it."""
    state = module.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
