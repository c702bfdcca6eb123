"""train.py in two processes under torchrun: the losses of one process, and what a death leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from psm_kernels.training.batch_norm import set_batch_norm

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("torchvision")

# 2 steps an epoch; a bank that two batches do not fill, three do, and that 2 do not divide.
TINY = ["--limit", "32", "--batch-size", "16", "--bank", "41", "--epochs", "2", "--no-probe"]

# Everything in double precision: in single, rounding alone moves the loss of the eighth step of so
# small a batch in its third digit, from one run of two processes to the next.
SCRIPT = f"""
import functools, os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from psm_kernels.training.data import Views
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
train.METHODS["psm"] = functools.partial(train.METHODS["psm"], bank_dtype=torch.float64)
single = Views.__getitem__
def double(views, index):
    image, *rest = single(views, index)
    images = [x.double() for x in (image, *rest) if torch.is_tensor(x)]
    return *images, *(x for x in rest if not torch.is_tensor(x))
Views.__getitem__ = double
pathlib.Path("pid" + os.environ.get("RANK", "")).write_text(str(os.getpid()))
sys.exit(train.main())
"""


def start(folder, processes, *options):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "script.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def run(folder, processes, *options):
    process = start(folder, processes, *options)
    try:
        text, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


def metrics(folder):
    lines = (folder / "runs" / "digits-psm" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # Of 32 test images, whose features are nearly untrained, one may change its neighbors.
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "knn")} for row in rows]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Batch norm of each half, as two processes have it; SyncBatchNorm needs GPUs."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, 1, *TINY, "--bn-splits", "2")
    return folder


def test_two_processes_have_the_losses_of_one(one_process, tmp_path):
    text = run(tmp_path, 2, *TINY, "--shard-bank")
    assert text.count("epoch   1 ") == 1  # one process prints
    got, expected = metrics(tmp_path), metrics(one_process)
    assert [row["epoch"] for row in got] == [1, 2]
    for row, wanted in zip(got, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)  # they are averaged in single precision
    states = [
        torch.load(f / "runs" / "digits-psm" / "checkpoint.pt") for f in (tmp_path, one_process)
    ]
    for part in ("encoder", "predictor", "momentum", "criterion"):
        for name, value in states[1][part].items():
            torch.testing.assert_close(states[0][part][name], value, rtol=1e-8, atol=1e-10)


def test_a_killed_process_ends_the_job_and_leaves_a_whole_checkpoint(one_process, tmp_path):
    """With replicated banks, whose first epoch is compared with one process's too."""
    process = start(tmp_path, 2, *TINY, "--epochs", "500")
    try:
        for line in process.stdout:
            if line.startswith("epoch   1 "):
                break
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        begin = time.monotonic()
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert time.monotonic() - begin < 45
    assert "SIGKILL" in text or "-9" in text
    path = tmp_path / "runs" / "digits-psm" / "checkpoint.pt"
    state = torch.load(path)
    assert state["criterion"]["memory_bank.bank"].shape == (41, 128)
    assert metrics(tmp_path)[0] == pytest.approx(metrics(one_process)[0], rel=1e-6)
    # Where it stopped, one process goes on.
    done = len(state["history"])
    state["settings"] |= {"epochs": done + 1, "bn_splits": 2}
    torch.save(state, path)
    run(tmp_path, 1, "--resume", "--no-probe")
    assert len(metrics(tmp_path)) == done + 1


@pytest.mark.parametrize(
    ("option", "words"),
    [("--shard-bank", "torchrun"), ("--sync-bn", "needs GPUs, got the device cpu")],
)
def test_one_cpu_process_refuses(tmp_path, monkeypatch, capsys, option, words):
    monkeypatch.syspath_prepend(ROOT)
    train = __import__("train")
    assert train.main([*TINY, "--runs", str(tmp_path), "--device", "cpu", option]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.0, "affine": False}],
)
def test_split_batch_norm_is_batch_norm_of_each_part(options):
    torch.manual_seed(0)
    for kind, shape in ((nn.BatchNorm1d, (12, 5)), (nn.BatchNorm2d, (12, 5, 3, 2))):
        plain = kind(5, **options)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        parts = [kind(5, **options) for _ in range(3)]
        for part in parts:
            part.load_state_dict(plain.state_dict())
        split = set_batch_norm(nn.Sequential(plain), splits=3)[0]
        for _ in range(2):
            x = torch.randn(shape, requires_grad=True)
            y = split(x)
            expected = torch.cat([p(c) for p, c in zip(parts, x.chunk(3), strict=True)])
            torch.testing.assert_close(y, expected)
            gradients = [torch.autograd.grad(o.square().sum(), x)[0] for o in (y, expected)]
            torch.testing.assert_close(*gradients)
        for name, value in split.named_buffers():
            each = torch.stack([getattr(p, name).float() for p in parts])
            torch.testing.assert_close(value.float(), each.mean(0))
        x = torch.randn(shape)
        plain = kind(5, **options).eval()
        plain.load_state_dict(split.state_dict())
        chunks = x.chunk(1 if split.track_running_stats else 3)  # without: of each part, as ever
        assert torch.equal(split.eval()(x), torch.cat([plain(c) for c in chunks]))


def test_split_batch_norm_refuses_what_it_cannot_split():
    split = set_batch_norm(nn.Sequential(nn.BatchNorm1d(5)), splits=3)
    with pytest.raises(ValueError, match="batch: got 10 rows, wanted a multiple of splits = 3"):
        split(torch.randn(10, 5))
    assert split[0].num_batches_tracked == 0
    with pytest.raises(ValueError, match="splits: got LazyBatchNorm1d"):
        set_batch_norm(nn.LazyBatchNorm1d(), splits=3)
