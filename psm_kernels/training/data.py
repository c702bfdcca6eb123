"""The images of train.py: six data sets, their augmentations, and views that can be repeated.

torchvision is needed here and in networks.py, scikit-learn here and in psm_kernels/evaluate.py.
"""

import gzip
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    default_collate,
)
from torchvision.transforms import v2

from psm_kernels.noise import philox_words
from psm_kernels.training.augment import NUMBERS, CropFlipLight, Plain

MEAN_STD = {  # per channel of the training images
    "digits": ((0.305,), (0.376,)),
    "fashionmnist": ((0.286,), (0.353,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DATA_SETS = tuple(MEAN_STD)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def load_images(
    name: str, root: str | Path, *, train: bool, download: bool = False, limit: int = 0
) -> Dataset:
    """A map-style data set of (PIL image or uint8 tensor, label).

    Args:
        name: one of `DATA_SETS`.
        root: folder that holds the data; digits come with scikit-learn and ignore it.
        train: the training or the test images.
        download: fetch what is missing, where it can be had; nothing is fetched otherwise.
        limit: a fixed random subset of that many images, 0 for all.

    Raises:
        FileNotFoundError: the data are missing or damaged; names the folder that was looked for.
        ValueError: unknown name.
    """
    root = Path(root)
    if name == "digits":
        data = _digits(train)
    elif name == "fashionmnist":
        data = _fashion_mnist(root, train, download)
    elif name in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, name.upper())
        try:
            data = kind(root, train=train, download=download)
        except RuntimeError as error:  # torchvision's for missing and for damaged files
            raise FileNotFoundError(
                f"{name} is missing or damaged: wanted the folder {root / kind.base_folder}; "
                f"--download fetches it"
            ) from error
    elif name == "tinyimagenet":
        data = _tiny_imagenet(root, train, download)
    elif name == "imagefolder":
        data = _image_folder(root / ("train" if train else "val"))
    else:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(DATA_SETS)}")
    if 0 < limit < len(data):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data = Subset(data, order[:limit].tolist())
    return data


def _digits(train: bool) -> list:
    """1,797 grey 8x8 images inside scikit-learn's wheel; 360 of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x.reshape(-1, 1, 8, 8) * (255 / 16)).to(torch.uint8)
    split = train_test_split(range(len(y)), test_size=360, stratify=y, random_state=0)
    return [(torchvision.tv_tensors.Image(images[i]), int(y[i])) for i in split[not train]]


def _fashion_mnist(root: Path, train: bool, download: bool) -> list:
    """60,000 grey 28x28 images and 10,000 for testing, of torchvision or of Debian."""
    try:
        found = torchvision.datasets.FashionMNIST(root, train=train, download=download)
        images, labels = found.data, found.targets
    except RuntimeError as error:  # missing or damaged
        part = "train" if train else "t10k"
        paths = [DEBIAN / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        if not all(path.exists() for path in paths):
            raise FileNotFoundError(
                f"fashionmnist is missing or damaged: wanted the folder {root / 'FashionMNIST'}; "
                f"--download fetches it, so does Debian's package dataset-fashion-mnist"
            ) from error
        # Behind a head of 16 and of 8 bytes, which says how many there are.
        images, labels = (
            torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)[
                head:
            ]
            for path, head in zip(paths, (16, 8), strict=True)
        )
    images = torchvision.tv_tensors.Image(images.view(-1, 1, 28, 28))
    return list(zip(images, labels.tolist(), strict=True))


def _image_folder(folder: Path, hint: str = "") -> torchvision.datasets.ImageFolder:
    try:
        return torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no images in {folder}: wanted one folder of images per class in it{hint}"
        ) from error


def _tiny_imagenet(root: Path, train: bool, download: bool) -> torchvision.datasets.ImageFolder:
    """TinyImageNet as its archive unpacks: the labels of val/ stand in a text file."""
    folder = root / "tiny-imagenet-200"
    if download and not folder.exists():
        torchvision.datasets.utils.download_and_extract_archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            str(root),
            md5="90528d7ca1a48142e341f4ef8d21d0de",
        )
    training = _image_folder(folder / "train", "; --download fetches it")
    if train:
        return training
    data = _image_folder(folder / "val")
    annotations = folder / "val" / "val_annotations.txt"
    if annotations.exists():  # else val/ was sorted into one folder per class
        rows = [line.split("\t") for line in annotations.read_text().splitlines()]
        label = {image: training.class_to_idx[wnid] for image, wnid, *_ in rows}
        data.samples = [(path, label[Path(path).name]) for path, _ in data.samples]
    return data


def transforms(name: str, size: int) -> tuple[Callable, Callable]:
    """The random transform of a view, and the plain one for evaluation; both give (C, size, size).

    The augmentations are those of the released code (dhkdhk/PSM, src/datasets.py); digits have
    their own: a mirrored digit is no digit, and of 8 x 8 pixels a crop leaves too little. Fashion
    MNIST's take a batch: one by one its small images would take more time than their networks.
    """
    if name == "fashionmnist":
        return CropFlipLight(size, *MEAN_STD[name]), Plain(size, *MEAN_STD[name])
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*MEAN_STD[name])]
    if name == "digits":
        bilinear = v2.InterpolationMode.BILINEAR
        affine = v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=bilinear)
        augment = [v2.Resize(size), affine, v2.ColorJitter(0.2, 0.2)]
        return v2.Compose(augment + last), v2.Compose([v2.Resize(size), *last])
    augment = [
        v2.RandomResizedCrop(size),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomHorizontalFlip(),
    ]
    if not name.startswith("cifar"):  # the recipe blurs larger images only
        blur = v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))  # a tenth of the image, odd
        augment.append(v2.RandomApply([blur], p=0.5))
    plain = [v2.Resize(size if size <= 64 else size * 8 // 7), v2.CenterCrop(size)]
    return v2.Compose(augment + last), v2.Compose(plain + last)


class Views(Dataset):
    """Transformed copies of each image, then its label, and with `index` its place in the set.

    The random numbers of a view depend on (seed, epoch, index) alone: they are the same after a
    resume and with any number of workers. The global generator is left as it was.
    """

    collate = staticmethod(default_collate)

    def __init__(
        self, images: Dataset, copies: list[Callable], seed: int = 0, *, index: bool = False
    ):
        self.images, self.copies, self.seed, self.epoch = images, copies, seed, 0
        self.index = index

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        image, label = self.images[index]
        number = (self.seed * 10_007 + self.epoch) * 10_000_019 + index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number % 2**32)  # its seeds have 32 bits
            views = (transform(image) for transform in self.copies)
            return (*views, label, index) if self.index else (*views, label)

    def batches(
        self,
        size: int,
        *,
        epoch: int | None = None,
        workers: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> DataLoader:
        """Shuffled full batches of a training epoch; all images in order when epoch is None.
        `part`, a rank and a number of processes: that rank's rows of each batch."""
        self.epoch, train = epoch or 0, epoch is not None
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        order = RandomSampler(self, generator=generator) if train else SequentialSampler(self)
        return DataLoader(
            self,
            batch_sampler=_Part(BatchSampler(order, size, drop_last=train), *part),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=generator,
            collate_fn=self.collate,
        )


class BatchViews(Views):
    """The same of small images, all of one size, whose transforms take a batch and its numbers."""

    collate = staticmethod(tuple)  # __getitems__ made the batch

    def __init__(self, images: Dataset, copies: list[Callable], seed: int = 0, *, index=False):
        super().__init__(images, copies, seed, index=index)
        self.pixels = torch.stack([torch.as_tensor(image) for image, _ in images])  # (N, C, H, W)
        self.labels = torch.tensor([label for _, label in images])

    def __getitem__(self, index: int) -> tuple:
        return tuple(column[0] for column in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple:
        rows = torch.tensor(indices)
        state = torch.tensor([self.seed, self.epoch])
        slots = torch.arange(NUMBERS * len(self.copies))
        numbers = philox_words(rows, slots, state).float() / 2**32  # (B, NUMBERS * copies)
        views = (
            transform(self.pixels[rows], part)
            for transform, part in zip(self.copies, numbers.split(NUMBERS, 1), strict=True)
        )
        last = (self.labels[rows], rows) if self.index else (self.labels[rows],)
        return (*views, *last)


def load_views(
    name: str,
    root: str | Path,
    size: int,
    *,
    seed: int = 0,
    download: bool = False,
    limit: int = 0,
    holdout: int = 0,
) -> tuple[Views, Views, Views]:
    """Two random views, label and index of each training image to learn from, then the plain
    training and test images with labels to evaluate with.

    Arguments: of `load_images`, `transforms` and `Views`; holdout: that many training images are
    not trained on and stand in the place of the test images, to choose settings by.

    Raises:
        ValueError: holdout leaves no images to train on.
    """
    train, test = (
        load_images(name, root, train=part, download=download, limit=limit)
        for part in (True, False)
    )
    if holdout:
        if holdout >= len(train):
            raise ValueError(f"holdout: got {holdout}, wanted less than {len(train)} images")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1)).tolist()
        train, test = Subset(train, order[holdout:]), Subset(train, order[:holdout])
    augment, plain = transforms(name, size)
    kind = BatchViews if name == "fashionmnist" else Views
    views = kind(train, [augment, augment], seed, index=True)
    return views, kind(train, [plain]), kind(test, [plain])


class _Part(Sampler):
    """One process's rows of each batch; joined in rank order they are the batch."""

    def __init__(self, batches: BatchSampler, rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world

    def __iter__(self):
        for batch in self.batches:
            start, stop = (len(batch) * r // self.world for r in (self.rank, self.rank + 1))
            yield batch[start:stop]

    def __len__(self) -> int:
        return len(self.batches)
