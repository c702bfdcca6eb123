"""State that travels with a module and that nobody else writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeldState(nn.Module):
    """A module whose tensors follow `.to()`, `state_dict`, deepcopy and pickle, but are no buffers.

    Whoever walks `buffers()` takes them for statistics: AveragedModel(use_buffers=True) averages
    them, DDP broadcasts rank 0's over the others'. A bank of keys is neither.
    """

    def __init__(self):
        super().__init__()
        self._held: dict[str, str] = {}  # name in the state_dict -> attribute

    def hold(self, name: str, value: Tensor, *, attribute: str | None = None) -> None:
        """Make `self.name` such a tensor; `attribute`: keep it there, and `name` for saving."""
        self._held[name] = attribute or name
        setattr(self, self._held[name], value)

    def saved(self, name: str) -> Tensor:
        """What goes into a state_dict."""
        return getattr(self, self._held[name])

    def restore(self, name: str, loaded: Tensor) -> None:
        """Takes what came out of one; the shapes agree."""
        getattr(self, self._held[name]).copy_(loaded)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for attribute in self._held.values():
            setattr(self, attribute, fn(getattr(self, attribute)))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._held:
            destination[prefix + name] = self.saved(name)

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        # First, because it runs the hooks that translate older checkpoints.
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        loaded = {name: state_dict.get(prefix + name) for name in self._held}
        unexpected[:] = [key for key in unexpected if key.removeprefix(prefix) not in self._held]
        for name, value in loaded.items():
            if value is None:
                missing.append(prefix + name)
            elif value.shape != self.saved(name).shape:
                got, wanted = tuple(value.shape), tuple(self.saved(name).shape)
                errors.append(f"{prefix}{name}: got shape {got}, wanted {wanted}")
            elif value.is_floating_point() != self.saved(name).is_floating_point():
                got, wanted = value.dtype, self.saved(name).dtype
                errors.append(
                    f"{prefix}{name}: got {got}, wanted {wanted}; a bank cannot be averaged"
                )
        for name, value in loaded.items():
            if value is None or errors:
                continue
            if metadata.get("assign_to_params_buffers") and self.saved(name).is_meta:
                setattr(self, self._held[name], value)
            else:
                self.restore(name, value)
