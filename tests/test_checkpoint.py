"""A loaded checkpoint goes on exactly, and an interrupted save leaves the old one."""

import datetime
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from psm_kernels import PSMLoss
from psm_kernels.training.checkpoint import load_checkpoint, save_checkpoint


def make_parts(seed: int) -> dict:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)
    criterion = PSMLoss(0.5, (16, 4), backend="reference")
    return {"encoder": encoder, "criterion": criterion, "optimizer": optimizer}


def train(parts: dict, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 6) * random.random() * np.random.rand()
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


def test_numpy_and_paths_come_back_as_plain_values(tmp_path):
    parts, path = make_parts(0), tmp_path / "a.pt"
    schedule = np.linspace(0.1, 0, 5)
    for group in parts["optimizer"].param_groups:  # as the scripts of DINO and MAE do
        group["lr"], group["weight_decay"] = schedule[1], np.asarray(0.5)
    more = {
        "best": np.float32(0.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
        "schedule": schedule[::-1],
        "swapped": np.arange(3, dtype=">i4"),
        "settings": {"runs": Path("a/b"), "sizes": [(np.int32(2), {np.int64(1): None})]},
    }
    save_checkpoint(path, parts, **more)
    state = load_checkpoint(path, make_parts(1))
    assert torch.equal(state["schedule"], torch.from_numpy(schedule[::-1].copy()))
    assert state["swapped"].tolist() == [0, 1, 2]
    assert {k: (type(state[k]), state[k]) for k in ("best", "epoch", "done")} == {
        "best": (float, 0.5),
        "epoch": (int, 3),
        "done": (bool, True),
    }
    assert state["settings"] == {"runs": str(Path("a/b")), "sizes": [(2, {1: None})]}
    (group,) = state["optimizer"]["param_groups"]
    assert (type(group["lr"]), group["lr"]) == (float, schedule[1])
    assert (type(group["weight_decay"]), group["weight_decay"]) == (float, 0.5)
    (kept,) = parts["optimizer"].param_groups
    assert isinstance(kept["lr"], np.float64)  # the running optimizer was not written


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"encoder": 1}, "encoder: got it for two"),
        ({"torch_rng": 1}, "torch_rng: got it for two"),
        ({"numpy_rng": 1}, "numpy_rng: got it for two"),
        ({"when": datetime.date(2020, 1, 1)}, "when: got datetime.date, which"),
        ({"a": [{"b": lambda: 1}]}, r"a\[0\]\['b'\]: got builtins.function, which"),
        ({"a": {Path: 1}}, "a key of a: got builtins.type, which"),
        ({"a": np.array(["x"])}, "a: got numpy.ndarray, which"),
        ({"a": np.array([None])}, "a: got numpy.ndarray, which"),
        ({"a": np.longdouble(1)}, "a: got numpy.longdouble, which"),
    ],
)
def test_what_load_would_refuse_is_refused_before_anything_is_written(tmp_path, more, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        save_checkpoint(tmp_path / "a.pt", make_parts(0), **more)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_part_like_a_generators_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^cuda_rng: got it for two"):
        save_checkpoint(tmp_path / "a.pt", {"cuda_rng": nn.Linear(1, 1)})


def test_load_says_what_was_wrong(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        load_checkpoint(path)
    save_checkpoint(path, make_parts(0), epoch=1)
    for change, message in (
        ({"criterion": PSMLoss(0.5, (17, 4))}, r"a\.pt: criterion does not fit: .*\(16, 4\).*17"),
        (
            {"encoder": nn.Sequential(nn.Linear(6, 5))},
            r"a\.pt: encoder does not fit: .*size mismatch",
        ),
        ({"encoder": nn.Linear(6, 4)}, r"a\.pt: encoder does not fit: .*0\.weight"),
        ({"scaler": nn.Linear(6, 4)}, r"a\.pt has no scaler, but encoder, .*epoch"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(path, make_parts(0) | change)
        assert "\n" not in str(error.value)
    torch.save({"encoder": {}}, path)
    with pytest.raises(ValueError, match=r"a\.pt has no python_rng, .* but encoder"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"a\.pt has no python_rng, .* but nothing"):
        load_checkpoint(path)
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"a\.pt is damaged or no checkpoint: \w+: ."):
        load_checkpoint(path)
    torch.save({"when": datetime.date(2020, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"a\.pt is damaged or no checkpoint: .*datetime\.date"):
        load_checkpoint(path)


def test_a_checkpoint_without_numpys_generator_loads(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {})
    state = torch.load(path, weights_only=True)
    del state["numpy_rng"]
    torch.save(state, path)
    load_checkpoint(path, {})
