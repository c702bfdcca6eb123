"""Fashion MNIST: where its files lie, its augmentations a batch at a time, its small network."""

import gzip
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
from psm_kernels.training import augment, data, networks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
train = __import__("train")

IMAGES = torch.randint(256, (48, 28, 28), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 10


def write(folder: Path, suffix: str = "") -> None:
    """The four files of the data set; the test images are those of training backwards."""
    folder.mkdir(parents=True)
    opened = gzip.open if suffix else open
    for part, images, labels in (
        ("train", IMAGES, LABELS),
        ("t10k", IMAGES.flip(0), LABELS.flip(0)),
    ):
        head = struct.pack(">4i", 2051, 48, 28, 28)
        with opened(folder / f"{part}-images-idx3-ubyte{suffix}", "wb") as file:
            file.write(head + images.to(torch.uint8).numpy().tobytes())
        with opened(folder / f"{part}-labels-idx1-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(">2i", 2049, 48) + labels.to(torch.uint8).numpy().tobytes())


@pytest.fixture(params=["torchvision", "debian"])
def root(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    if request.param == "debian":
        write(tmp_path / "debian", ".gz")
    else:
        write(tmp_path / "data" / "FashionMNIST" / "raw")
    return tmp_path / "data"


def test_both_layouts_hold_the_same(root):
    for part, images, labels in ((True, IMAGES, LABELS), (False, IMAGES.flip(0), LABELS.flip(0))):
        found = data.load_images("fashionmnist", root, train=part)
        assert torch.equal(torch.stack([image[0] for image, _ in found]).long(), images)
        assert [label for _, label in found] == labels.tolist()
    assert len(data.load_images("fashionmnist", root, train=True, limit=7)) == 7


def test_missing_data_names_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"FashionMNIST.*--download.*dataset-fashion-mnist"):
        data.load_images("fashionmnist", tmp_path, train=True)


@pytest.mark.parametrize("root", ["torchvision"], indirect=True)
@pytest.mark.parametrize("options", [[], ["--no-probe", "--indexed-bank", "--holdout", "16"]])
def test_a_run(root, tmp_path, options):
    words = [
        "--data",
        "fashionmnist",
        "--data-dir",
        root,
        "--runs",
        tmp_path / "runs",
        "--name",
        "x",
    ]
    words += ["--bank", 32, "--batch-size", 16, "--epochs", 1, *options]
    assert train.main(list(map(str, words))) == 0
    result = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())
    assert result["loss"] > 0
    assert result["settings"]["arch"] == "resnet8"
    assert ("accuracy" in result) == ("--no-probe" not in options)


def test_held_out_images_are_not_trained_on(root):
    views, plain, test = data.load_views("fashionmnist", root, 28, holdout=16)
    assert (len(views), len(plain), len(test)) == (32, 32, 16)
    kept, held = ({image.numpy().tobytes() for image in x.pixels} for x in (plain, test))
    assert len(kept) == 32
    assert len(held) == 16
    assert not kept & held
    with pytest.raises(ValueError, match="holdout: got 48, wanted less than 48"):
        data.load_views("fashionmnist", root, 28, holdout=48)


def test_views_depend_on_seed_epoch_and_index_alone(root):
    views, _, _ = data.load_views("fashionmnist", root, 28, seed=3)
    state = torch.get_rng_state()

    def epoch(number, size, workers=0):
        found = {}
        for *pair, _, index in views.batches(size, epoch=number, workers=workers):
            found |= {int(i): torch.stack(rows) for i, *rows in zip(index, *pair, strict=True)}
        return torch.stack([found[i] for i in range(48)])  # (48, 2, 1, 28, 28)

    first = epoch(1, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first, epoch(1, 8))
    torch.testing.assert_close(first, epoch(1, 16, workers=1))
    assert not torch.equal(first, epoch(2, 16))
    assert not torch.equal(first[:, 0], first[:, 1])  # the two views differ
    views.epoch = 1
    torch.testing.assert_close(views[5][0], first[5, 0])
    assert views[5][2:] == (LABELS[5], 5)


def test_the_experiments_tune_train_and_tabulate(tmp_path, monkeypatch):
    """Trainings of three: one of the grid, one method, one variant; on 48 images."""
    from benchmarks import fashion_experiments as experiments

    monkeypatch.setattr(experiments, "METHODS", {"PSM": "psm"})
    monkeypatch.setattr(experiments, "VARIANTS", {"PSM, PNSM off": ["--selection", "all"]})
    monkeypatch.setattr(experiments, "GRID", {"temperature": (0.2,), "lr": (0.1,)})
    monkeypatch.setattr(experiments, "TUNED_WITH", ["--epochs", "1", "--holdout", "16"])
    write(tmp_path / "images/FashionMNIST/raw")
    words = ["--epochs", 1, "--seeds", 0, "--data-dir", tmp_path / "images"]
    words += ["--runs", tmp_path / "runs", "--results", tmp_path / "fashion.json", "--"]
    words += ["--batch-size", 16, "--bank", 32]
    experiments.main(list(map(str, words)))
    tables = json.loads((tmp_path / "fashion.json").read_text())["tables"]
    assert [row[:3] for row in tables["tuning"][1]] == [["PSM", "0.2", "0.1"]]
    names = ["PSM", "random encoder", "raw pixels"]
    assert [row[0] for row in tables["accuracy"][1]] == names
    assert all(row[2].endswith("%") for row in tables["accuracy"][1])
    own, off = (dict(zip(tables["settings"][0], row, strict=True)) for row in tables["settings"][1])
    assert own["negatives kept"] != off["negatives kept"] == "100.0%"
    assert own["seeds"] == "1"
    assert len(tables["purity"][1]) == 2


# --- the augmentation ----------------------------------------------------------------------------

SAME = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.0])  # of scale (1, 1): changes nothing


def views(images, numbers, **options):
    make = augment.CropFlipLight(28, (0.0,), (1.0,), **options)
    return make(images[:, None].to(torch.uint8), numbers.expand(len(images), -1))[:, 0]


def test_neutral_numbers_leave_the_image():
    torch.testing.assert_close(views(IMAGES, SAME, scale=(1, 1)), IMAGES / 255, atol=1e-5, rtol=0)


def test_a_flip_mirrors():
    numbers = SAME.clone()
    numbers[4] = 0.2
    wanted = IMAGES.flip(2) / 255
    torch.testing.assert_close(views(IMAGES, numbers, scale=(1, 1)), wanted, atol=1e-5, rtol=0)


def test_a_crop_enlarges_its_part():
    # A quarter of the area in the lower left corner: 14 x 14 pixels, each twice as large.
    numbers = SAME.clone()
    numbers[2], numbers[3] = 0.0, 1.0
    image = torch.zeros(1, 28, 28)
    image[0, 14:, :14] = 200
    found = views(image, numbers, scale=(0.25, 0.25))
    assert found[0, 1:, :-1].min() == pytest.approx(200 / 255)


def test_light_scales_and_spreads():
    numbers, image = SAME.clone(), torch.full((1, 28, 28), 100)
    numbers[5] = 1.0
    found = views(image, numbers, scale=(1, 1), light=0.5)
    assert found.mean() == pytest.approx(1.5 * 100 / 255, rel=1e-5)
    image[:, :14] = 50
    numbers[5], numbers[6] = 0.5, 0.0  # half the contrast around the mean
    found = views(image, numbers, scale=(1, 1), light=0.5)
    assert found.mean() == pytest.approx(75 / 255, rel=1e-5)
    assert found.amax() - found.amin() == pytest.approx(25 / 255, rel=1e-4)


def test_each_image_has_its_own_numbers():
    image = IMAGES[:1].expand(4, -1, -1)
    numbers = torch.rand(4, augment.NUMBERS, generator=torch.Generator().manual_seed(1))
    make = augment.CropFlipLight(28, (0.0,), (1.0,))
    together = make(image[:, None].to(torch.uint8), numbers)
    alone = [make(image[:1, None].to(torch.uint8), row[None]) for row in numbers]
    torch.testing.assert_close(together, torch.cat(alone))
    assert all(not torch.equal(together[0], other) for other in together[1:])


@pytest.mark.parametrize("size", [14, 28, 32])
def test_the_plain_view_has_the_wanted_size(size):
    found = augment.Plain(size, (0.5,), (0.5,))(IMAGES[:, None].to(torch.uint8))
    assert found.shape == (48, 1, size, size)
    assert found.amin() >= -1
    assert found.amax() <= 1


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_resnet8(channels, size):
    encoder = networks.make_encoder("resnet8", 64, channels=channels)
    assert sum(p.numel() for p in encoder[0].parameters()) < 80_000
    assert encoder[0](torch.rand(2, channels, size, size)).shape == (2, 1024)
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, 64)
