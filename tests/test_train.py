"""train.py from the outside: what it leaves, that a resume is exact, and how it refuses."""

import json
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT))
train = __import__("train")
data = sys.modules["psm_kernels.training.data"]

# 4 steps an epoch; a bank that the two batches of its filling fill exactly.
TINY = ["--limit", "64", "--batch-size", "16", "--bank", "32", "--epochs", "2"]
KEYS = {"epoch", "loss", "knn", "positive_purity", "kept", "grad_mean", "grad_var", "bank_fill"}
KEYS |= {"own_copies", "lr", "images_per_s"}


def run(folder: Path, *options: str) -> int:
    return train.main(["--runs", str(folder), "--name", "run", *map(str, options)])


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without the speed, the one thing that may differ."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leaves(value, path=""):
    """Every tensor and number of a nested state, by path."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from leaves(child, f"{path}/{name}")
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield from leaves(child, f"{path}/{i}")
    else:
        yield path, value


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, *TINY) == 0
    return folder


@pytest.fixture
def interrupt(monkeypatch, request):
    """Send a real SIGINT at the n-th time the bank is written."""

    def at(call: int) -> None:
        # A background job starts with SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        enqueue, calls = train.losses.PSMLoss.enqueue, []

        def spy(self, *args, **kwargs):
            calls.append(0)
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return enqueue(self, *args, **kwargs)

        monkeypatch.setattr(train.losses.PSMLoss, "enqueue", spy)

    return at


def test_what_a_run_leaves(finished):
    folder = finished / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == KEYS
        assert row["bank_fill"] == 1
        assert all(0 <= row[name] <= 1 for name in ("knn", "positive_purity", "kept"))
    assert json.loads((folder / "settings.json").read_text())["batch_size"] == 16
    result = json.loads((folder / "result.json").read_text())
    assert result["loss"] == rows[-1]["loss"]
    assert len(result["accuracy"]) == 3
    for scores in result["accuracy"].values():
        assert set(scores) == {"knn", "linear", "linear_10"}
    assert len(result["gradient"]["mean"]) == len(result["gradient"]["var"]) == 32
    for name in ("curves.png", "gradient.png", "mined.png"):
        assert min(Image.open(folder / name).size) > 300
    assert not list(folder.glob("*.tmp"))


# The 2 filling writes and the 4 of epoch 1 come first: 8 stops in the middle of epoch 2, 3 before
# the first epoch is through.
@pytest.mark.parametrize("call", [8, 3])
def test_ctrl_c_then_resume_equals_the_uninterrupted_run(
    finished, tmp_path, monkeypatch, capsys, interrupt, call
):
    interrupt(call)
    assert run(tmp_path, *TINY) == 130
    monkeypatch.undo()
    error = capsys.readouterr().err.strip()
    assert "--resume" in error
    assert "Traceback" not in error
    assert run(tmp_path, "--resume", "--no-probe") == 0  # the checkpoint knows the other settings
    assert metrics(tmp_path) == metrics(finished)

    states = [torch.load(f / "run" / "checkpoint.pt") for f in (finished, tmp_path)]
    for state in states:
        del state["settings"], state["history"]
    for (name, a), (_, b) in zip(*map(leaves, states), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_an_indexed_bank_has_a_slot_for_each_image(tmp_path):
    """64 images, of which two batches of 16 filled 32 slots; an epoch goes through all of them."""
    assert run(tmp_path, *TINY, "--indexed-bank", "--no-probe") == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["criterion"]
    assert state["memory_bank.ids"].tolist() == list(range(64))
    first, second = metrics(tmp_path)
    assert first["bank_fill"] <= second["bank_fill"] == 1
    assert second["own_copies"] == 1


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("sscl", {"temperature": 0.5, "tau_plus": 0.05, "num_hard": 32}),
        ("hcl", {"temperature": 0.5, "tau_plus": 0.1, "beta": 1.0}),
        ("unremix", {"temperature": 0.5, "similarity_weight": 1 / 3}),
        ("infonce", {"temperature": 0.2}),
        ("nnclr", {"temperature": 0.2}),
        ("supcon", {"temperature": 0.1}),
        ("ressl", {"temperature": 0.1, "teacher_temperature": 0.04}),
        ("msf", {"topk": 5}),
    ],
)
def test_other_methods_train_with_their_defaults(tmp_path, method, defaults):
    small = [*TINY, "--limit", 32, "--epochs", 1, "--no-probe"]  # 2 steps
    assert run(tmp_path, *small, "--method", method) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings | defaults == settings
    (row,) = metrics(tmp_path)
    assert row["loss"] > (0.01 if method == "msf" else 1)  # log of 1 + 32 negatives is 3.5
    assert row["bank_fill"] == 1
    assert row["positive_purity"] is None


def test_a_setting_of_another_method_is_refused(tmp_path, capsys):
    for method, name in (("hcl", "topk"), ("msf", "temperature")):
        assert run(tmp_path, *TINY, "--method", method, f"--{name}", 3) == 2
        refused = capsys.readouterr().err
        assert re.search(f"{name}: got 3.*, but --method {method} has no such setting", refused)
    assert not (tmp_path / "run").exists()


def test_resume_of_a_finished_run_changes_no_metric(finished, tmp_path):
    before = metrics(finished)
    assert run(finished, "--resume", "--no-probe") == 0
    assert metrics(finished) == before


def test_accumulation_moves_the_bank_once_per_step(tmp_path, monkeypatch):
    kind, seen, written = train.losses.PSMLoss, [], []
    forward, enqueue = kind.forward, kind.enqueue

    def spy_forward(self, query, key, **kwargs):
        seen.append((len(query), self.memory_bank.ptr.item()))
        return forward(self, query, key, **kwargs)

    def spy_enqueue(self, key, labels=None, **kwargs):
        written.append(len(key))
        return enqueue(self, key, labels, **kwargs)

    monkeypatch.setattr(kind, "forward", spy_forward)
    monkeypatch.setattr(kind, "enqueue", spy_enqueue)
    assert run(tmp_path, *TINY, "--epochs", 1, "--accumulate", 2, "--no-probe") == 0
    assert written == [16] * (2 + 4)  # two to fill the bank, then one an optimizer step
    assert [rows for rows, _ in seen] == [2 * 8] * (4 * 2)  # both directions; steps, passes
    # 16 rows a step into 32 slots: the two calls of one step see one state of the bank.
    assert [ptr for _, ptr in seen] == [0] * 2 + [16] * 2 + [0] * 2 + [16] * 2


REFUSED = {
    "unknown data set": (["--data", "mnist"], "mnist"),
    "unknown option": (["--learning-rate", "1"], "learning-rate"),
    "no CIFAR10": (["--name", "other", "--data", "cifar10"], "cifar-10-batches-py"),
    "no CIFAR100": (["--name", "other", "--data", "cifar100"], "cifar-100-python"),
    "no TinyImageNet": (["--name", "other", "--data", "tinyimagenet"], "tiny-imagenet-200"),
    "no image folder": (["--name", "other", "--data", "imagefolder"], "train"),
    "nothing to resume": (["--resume", "--name", "other"], "other"),
    "a run of that name": ([], "--resume"),
    "a batch beyond the data": (["--name", "other", "--limit", "15"], "batch_size"),
    "a batch not divisible": (["--name", "other", "--accumulate", "3"], "batch_size"),
    "a loss option": (["--name", "other", "--selection", "some"], "selection"),
    "a loss number": (["--name", "other", "--temperature", "0"], "temperature"),
    "a setting": (["--name", "other", "--epochs", "0"], "epochs"),
    "a device": (["--name", "other", "--device", "abacus"], "device"),
    "another setting": (
        ["--resume", "--lr", "0.5", "--seed", "3"],
        "lr (saved 0.1, given 0.5), seed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal(finished, capsys, case):
    options, wanted = REFUSED[case]
    before = contents(finished)
    base = [] if "--resume" in options else TINY
    assert run(finished, *base, "--data-dir", finished / "none", *options) == 2
    out, error = capsys.readouterr()
    assert wanted in error
    assert error.count("\n") == 1
    assert out == ""
    assert contents(finished) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "another pickle", "a part is missing"])
def test_damaged_checkpoint(finished, tmp_path, capsys, damage):
    whole = (finished / "run" / "checkpoint.pt").read_bytes()
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    if damage == "another pickle":
        torch.save([1, 2, 3], path)
    elif damage == "a part is missing":
        state = torch.load(finished / "run" / "checkpoint.pt")
        del state["encoder"]["0.conv1.weight"]
        torch.save(state, path)
    else:
        path.write_bytes(whole[: len(whole) // 2 if damage == "truncated" else 0])
    before = contents(tmp_path)
    assert run(tmp_path, "--resume") == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    contrast, calls = train.contrast, []

    def diverge(*args, **kwargs):
        calls.append(0)
        factor = float("nan") if len(calls) > 4 else 1  # steps of an epoch
        return [value * factor for value in contrast(*args, **kwargs)]

    monkeypatch.setattr(train, "contrast", diverge)
    assert run(tmp_path, *TINY, "--no-probe") == 2
    assert "nan in epoch 2" in capsys.readouterr().err
    assert len(torch.load(tmp_path / "run" / "checkpoint.pt")["history"]) == 1


def test_bf16(tmp_path):
    assert run(tmp_path, *TINY, "--epochs", 1, "--no-probe", "--amp", "bf16") == 0
    assert metrics(tmp_path)[0]["loss"] > 0


def test_without_mining(tmp_path):
    options = ["--epochs", 1, "--topk", 0, "--selection", "all", "--no-probe"]
    assert run(tmp_path, *TINY, *options) == 0
    assert metrics(tmp_path)[0]["kept"] == 1


@pytest.mark.parametrize(
    ("topk", "keep"), [(0, None), (3, None), (3, (50.0, 0.0)), (40, (0.5, 0.0))]
)
def test_mined_picture(tmp_path, topk, keep):
    images = [(torch.rand(3, 8, 8), i % 2) for i in range(20)]
    query, key, bank = torch.randn(2, 4), torch.randn(2, 4), torch.randn(20, 4)
    path, mean_std = tmp_path / "mined.png", ((0.5,) * 3, (0.2,) * 3)
    options = {"topk": topk, "keep": keep, "mean_std": mean_std}
    train.plots.draw_mined(images, images, query, key, bank, path, **options)
    assert min(Image.open(path).size) > 150


def test_json_has_no_nan(tmp_path):
    train.write_json(tmp_path / "x", {"purity": float("nan"), "loss": 1.5}, {"rows": [1]})
    lines = (tmp_path / "x").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"purity": None, "loss": 1.5}, {"rows": [1]}]


def test_learning_rate():
    s = train.Settings()
    rates = [train.learning_rate(s, epoch) for epoch in range(s.epochs + 1)]
    assert rates[0] == s.min_lr
    assert max(rates) == rates[s.warmup] == s.lr
    assert rates[-1] == pytest.approx(s.min_lr)
    assert rates[110] == pytest.approx((s.lr + s.min_lr) / 2)  # half of the cosine
    assert train.learning_rate(train.Settings(warmup=0), 0) == s.lr


def test_views_depend_on_seed_epoch_and_index_alone():
    images = data.load_images("digits", "", train=True, limit=16)
    augment, _ = data.transforms("digits", 8)
    views = data.Views(images, [augment, augment], seed=3)
    state = torch.get_rng_state()

    def epoch(number, workers=0):
        return [torch.stack(pair) for *pair, _ in views.batches(8, epoch=number, workers=workers)]

    first, second = epoch(1), epoch(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, epoch(1)))
    assert all(map(torch.equal, first, epoch(1, workers=2)))
    assert not any(map(torch.equal, first, second))
    assert not torch.equal(first[0][0], first[0][1])  # the two views differ


# --- the other data sets, written as they lie on disk ------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> list[tuple[torch.Tensor, int]]:
    """40 color images of 32 x 32 made of digits, of the classes 0 to 3."""
    grey = [(image, label) for image, label in data.load_images("digits", "", train=True)]
    grey = [pair for pair in grey if pair[1] < 4][:40]
    yellow = torch.tensor([1, 1, 0], dtype=torch.uint8)[:, None, None]
    return [(enlarge(torch.as_tensor(image) * yellow, 4), label) for image, label in grey]


def enlarge(image: torch.Tensor, times: int) -> torch.Tensor:
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def write_cifar10(root: Path, pictures) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rows = {
        "data": torch.stack([image.flatten() for image, _ in pictures]).numpy(),
        "labels": [label for _, label in pictures],
    }
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(rows))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))


def write_cifar100(root: Path, pictures) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    rows = {
        "data": torch.stack([image.flatten() for image, _ in pictures]).numpy(),
        "fine_labels": [label for _, label in pictures],
    }
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps(rows))
    meta = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta))


def write_image(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)


def write_tinyimagenet(root: Path, pictures) -> None:
    folder, lines = root / "tiny-imagenet-200", []
    for i, (image, label) in enumerate(pictures):
        image = enlarge(image, 2)  # 64 x 64
        name = f"n0{label}"
        write_image(folder / "train" / name / "images" / f"{name}_{i}.JPEG", image)
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", image)
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


def write_imagefolder(root: Path, pictures) -> None:
    for i, (image, label) in enumerate(pictures):
        for part in ("train", "val"):
            write_image(root / part / f"class {label}" / f"{i}.png", image)


@pytest.mark.parametrize(
    ("name", "write", "copies"),
    [
        ("cifar10", write_cifar10, 5),
        ("cifar100", write_cifar100, 1),
        ("tinyimagenet", write_tinyimagenet, 1),
        ("imagefolder", write_imagefolder, 1),
    ],
)
def test_data_sets(tmp_path, monkeypatch, pictures, name, write, copies):
    # torchvision compares checksums with those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", pictures)
    for part, length in ((True, copies * 40), (False, 40)):
        images = data.load_images(name, tmp_path / "data", train=part)
        assert len(images) == length
        # Sum of the red channel by label: the right picture is with the right label.
        got, wanted = (dict.fromkeys(range(4), 0.0) for _ in range(2))
        for source, sums, factor in ((images, got, 40 / length), (pictures, wanted, 1)):
            for image, label in source:
                image = data.v2.functional.to_image(image).float()
                sums[label] += image[0].mean().item() * factor
        assert got == pytest.approx(wanted, rel=0.03)
    options = ["--data", name, "--data-dir", tmp_path / "data", "--image-size", 32]
    options += ["--batch-size", 8, "--bank", 12, "--epochs", 1, "--limit", 16, "--no-probe"]
    assert run(tmp_path, *options) == 0
    assert metrics(tmp_path)[0]["loss"] > 0
