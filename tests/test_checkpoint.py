"""A loaded checkpoint goes on exactly, and an interrupted save leaves the old one."""

import random

import pytest
import torch
from torch import nn

from psm_kernels import PSMLoss
from psm_kernels.checkpoint import load_checkpoint, save_checkpoint


def make_parts(seed: int) -> dict:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)
    return {"encoder": encoder, "criterion": PSMLoss(0.5, (16, 4)), "optimizer": optimizer}


def train(parts: dict, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 6) * random.random()
        loss = parts["criterion"](parts["encoder"](x), parts["encoder"](x).detach())
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()
        losses.append(loss.item())
    return losses


def test_goes_on_exactly(tmp_path):
    parts, path = make_parts(0), tmp_path / "a.pt"
    train(parts, 3)
    save_checkpoint(path, parts, epoch=3, history=[{"loss": 1.0}])
    expected = train(parts, 3)
    again = make_parts(1)
    assert load_checkpoint(path)["epoch"] == 3
    assert train(again, 3) != expected  # reading alone changes nothing
    state = load_checkpoint(path, again)
    assert train(again, 3) == expected
    assert state["history"] == [{"loss": 1.0}]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    parts, path = make_parts(0), tmp_path / "a.pt"
    save_checkpoint(path, parts, epoch=1)
    before = path.read_bytes()

    def interrupted(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, parts, epoch=2)
    assert path.read_bytes() == before


def test_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        load_checkpoint(path)
    save_checkpoint(path, make_parts(0))
    other = make_parts(0) | {"criterion": PSMLoss(0.5, (17, 4))}
    with pytest.raises(ValueError, match=r"a\.pt is damaged"):
        load_checkpoint(path, other)
    torch.save({"encoder": {}}, path)
    with pytest.raises(ValueError, match=r"a\.pt is damaged"):
        load_checkpoint(path)
