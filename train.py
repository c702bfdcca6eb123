"""Train a ResNet without labels by PSM or its kin: python train.py

    python train.py                                       digits: no download, minutes on two cores
    python train.py --data cifar10 --download --amp bf16  the released recipe, for a GPU
    python train.py --resume                              go on where an interrupted run stopped
    torchrun --nproc-per-node 8 train.py --shard-bank     many processes, the bank divided
    python train.py --help                                every setting

Each run leaves settings, metrics.jsonl, result.json, checkpoint.pt and pictures in runs/<name>/.
Read from top to bottom: settings, model, training, checkpoint, evaluation, main. The images and
their augmentations are in psm_kernels/data.py.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import random
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from tqdm import tqdm

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    PSMLoss,
    SSCLLoss,
    UnReMixLoss,
    plots,
    rank_gradient_stats,
)
from psm_kernels.batch_norm import set_batch_norm
from psm_kernels.data import DATA_SETS, MEAN_STD, Views, load_images, transforms
from psm_kernels.distributed import rank_and_world
from psm_kernels.evaluate import encode, knn_accuracy, linear_probe


def setting(default, help, *, choices=None, least=None, free=False):
    """A field of Settings; a `free` one does not change the numbers and may change on --resume."""
    metadata = {"help": help, "choices": choices, "least": least, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """The command line. Defaults: the recipe released with PSM; RECIPES: what differs by data."""

    data: str = setting("digits", "data set", choices=DATA_SETS)
    data_dir: str = setting("data", "folder of the data; imagefolder: of train/, val/", free=True)
    download: bool = setting(False, "fetch a missing data set into data_dir", free=True)
    workers: int = setting(0, "processes that load images", least=0, free=True)
    limit: int = setting(0, "use that many training and test images, 0: all", least=0)
    image_size: int = setting(32, "side of the training crops", least=1)
    name: str = setting("", "run folder, default <data>-<method>", free=True)
    runs: str = setting("runs", "folder of the run folders", free=True)
    resume: bool = setting(False, "continue runs/<name> from its checkpoint", free=True)
    device: str = setting("auto", "cpu, cuda, ...; auto: a GPU if there is one", free=True)
    seed: int = setting(0, "of weights, augmentations and the noise of the loss", least=0)

    arch: str = setting("resnet18", "encoder", choices=("resnet18", "resnet34", "resnet50"))
    stem: str = setting("small", "first layers: 3x3 or ImageNet's", choices=("small", "large"))
    dim: int = setting(128, "dimension of queries and keys", least=1)
    ema: float = setting(0.99, "momentum of the key encoder", least=0)

    method: str = setting("psm", "loss", choices=("psm", "sscl", "unremix", "hcl", "infonce"))
    temperature: float = setting(0.5, "of the loss; infonce: 0.2")
    bank: int = setting(16384, "slots of the memory bank", least=1)
    topk: int = setting(5, "mined positives per query")
    a: float = setting(0.5, "negative selection: density")
    b: float = setting(0.0, "negative selection: peak relative to the positive's similarity")
    selection: str = setting("bernoulli", "bernoulli, expected or all negatives (PNSM off)")
    soft_weights: str = setting("attention", "of mined positives: attention, uniform or binary")
    hard_weight: float = setting(1.0, "of the augmented view's own loss")
    beta: float = setting(1.0, "hcl, sscl: concentration on hard negatives")
    tau_plus: float = setting(0.1, "hcl, sscl: share of false negatives; sscl: 0.05")
    num_hard: int = setting(32, "sscl: nearest negatives to mix from")
    num_synthetic: int = setting(8, "sscl: mixed negatives per query")
    mix: str = setting("pair", "sscl: pair, query or none")
    similarity_weight: float = setting(1 / 3, "unremix: of the similarity to the query")
    uncertainty_weight: float = setting(1 / 3, "unremix: of the gradient's size")
    representativeness_weight: float = setting(1 / 3, "unremix: of the distance to the others")

    epochs: int = setting(200, "passes over the training images", least=1)
    batch_size: int = setting(256, "images per optimizer step", least=2)
    accumulate: int = setting(1, "split a batch into that many passes to save memory", least=1)
    lr: float = setting(0.1, "peak learning rate", least=0)
    min_lr: float = setting(1e-4, "where warm-up starts and the cosine ends", least=0)
    warmup: int = setting(20, "epochs of linear warm-up", least=0)
    weight_decay: float = setting(1e-3, "of every parameter", least=0)
    amp: str = setting("none", "autocast of the networks", choices=("none", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile the networks")
    shard_bank: bool = setting(False, "divide the bank among torchrun's processes", free=True)
    sync_bn: bool = setting(False, "batch norm over all processes; needs GPUs")
    bn_splits: int = setting(1, "normalize as that many processes do, each its part", least=1)
    timeout: int = setting(30, "minutes to wait for another process", least=1, free=True)
    probe: bool = setting(True, "end with linear probes and pictures", free=True)


RECIPES = {
    "digits": {"image_size": 8, "bank": 1024, "batch_size": 64, "epochs": 16, "warmup": 1}
    | {"ema": 0.97},  # 350 steps in all: a slower key encoder would lag behind
    "tinyimagenet": {"image_size": 64, "stem": "large"},  # as released; small is 10 times the work
    "imagefolder": {"image_size": 224, "stem": "large"},
}
PARTS = ("encoder", "predictor", "momentum", "criterion", "optimizer", "scaler")  # of a checkpoint
METHODS = {  # loss, its settings above, defaults that differ from those above (sources: the losses)
    "psm": (PSMLoss, ("topk", "a", "b", "selection", "soft_weights", "hard_weight"), {}),
    "sscl": (
        SSCLLoss,
        ("beta", "tau_plus", "num_hard", "num_synthetic", "mix"),
        {"tau_plus": 0.05},
    ),
    "unremix": (
        UnReMixLoss,
        ("similarity_weight", "uncertainty_weight", "representativeness_weight"),
        {},
    ),
    "hcl": (HCLLoss, ("beta", "tau_plus"), {}),
    "infonce": (InfoNCELoss, (), {"temperature": 0.2}),
}
STATISTICS = ("positive_purity", "kept", "grad_mean", "grad_var", "bank_fill")


class UserError(Exception):
    """Ends the run with one line on stderr and exit status 2."""


def fail(message: str):
    raise UserError(message)


def command_line(argv: list[str] | None) -> dict:
    """The settings given on the command line, those alone."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.error = fail
    for field in dataclasses.fields(Settings):
        special = [f"{d}: {r[field.name]}" for d, r in RECIPES.items() if field.name in r]
        text = "; ".join([f"{field.metadata['help']} [{field.default}", *special]) + "]"
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, help=text, default=argparse.SUPPRESS, **kind)
    return vars(parser.parse_args(argv))


def check(s: Settings, given: dict) -> None:
    foreign = {name for _, names, _ in METHODS.values() for name in names} - {*METHODS[s.method][1]}
    for name in foreign & set(given):
        raise UserError(f"{name}: got {given[name]}, but --method {s.method} has no such setting")
    for field in dataclasses.fields(s):
        least, value = field.metadata["least"], getattr(s, field.name)
        if least is not None and not value >= least:
            raise UserError(f"{field.name}: got {value}, wanted at least {least}")
    if s.ema > 1:
        raise UserError(f"ema: got {s.ema}, wanted at most 1")
    _, world = rank_and_world()
    passes = s.accumulate * world * s.bn_splits
    if s.batch_size % passes or s.batch_size < 2 * passes:
        wanted = f"a multiple of accumulate x processes x bn_splits ({passes}), 2 images in each"
        raise UserError(f"batch_size: got {s.batch_size}, wanted {wanted}")


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(inplace=True),
        nn.Linear(512, outputs, bias=False),
        nn.BatchNorm1d(outputs, affine=False),
    )


def make_encoder(s: Settings) -> nn.Sequential:
    """Backbone and projector. The seed alone decides the weights."""
    torch.manual_seed(s.seed)
    backbone = torchvision.models.get_model(s.arch)
    channels, features = len(MEAN_STD[s.data][0]), backbone.fc.in_features
    if s.stem == "small":  # the released CIFAR stem: it keeps a max-pool, stride 1, no padding
        backbone.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.MaxPool2d(3, stride=1)
    elif channels != 3:
        backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    backbone.fc = nn.Identity()
    return nn.Sequential(backbone, mlp(features, s.dim))


def make_criterion(s: Settings) -> nn.Module:
    """The loss with its bank. Another method is one more row of METHODS."""
    loss, names, _ = METHODS[s.method]
    options = {name: getattr(s, name) for name in (*names, "seed")}
    options["shard_bank" if s.shard_bank else "gather_distributed"] = True
    return loss(s.temperature, (s.bank, s.dim), **options)


class Online(nn.Module):
    """The networks that learn, as one module for DistributedDataParallel."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)  # (B, D)
        return z1, z2, self.predictor(z1), self.predictor(z2)


class Run:
    """All that a training consists of; a checkpoint holds its PARTS and its history."""

    def __init__(self, s: Settings):
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(gpu if s.device == "auto" else s.device)
        if s.sync_bn and self.device.type != "cuda":
            raise ValueError(f"sync_bn: needs GPUs, got the device {self.device}; see --bn-splits")
        self.rank, self.world = rank_and_world()
        self.settings, self.folder = s, Path(s.runs) / s.name
        self.epoch, self.history = 0, []
        norm = {"sync": s.sync_bn, "splits": s.bn_splits}
        self.encoder = set_batch_norm(make_encoder(s), **norm).to(self.device)
        self.predictor = set_batch_norm(mlp(s.dim, s.dim), **norm).to(self.device)
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)
        self.criterion = make_criterion(s).to(self.device)
        moved = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD(moved, s.lr, momentum=0.9, weight_decay=s.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s.amp == "fp16")
        if s.compile:
            for module in (self.encoder, self.predictor, self.momentum):
                module.compile()
        self.online = Online(self.encoder, self.predictor)
        if self.world > 1:
            # Those of batch norm: each process has its own, averaged at the end of an epoch.
            self.online._ddp_params_and_buffers_to_ignore = dict(self.online.named_buffers())
            self.online = nn.parallel.DistributedDataParallel(self.online)

    def average(self, *tensors: torch.Tensor) -> None:
        """Over all processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.world

    def autocast(self):
        dtype = torch.float16 if self.settings.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.settings.amp != "none")

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.to(self.device, non_blocking=True) for t in tensors]


def learning_rate(s: Settings, epoch: float) -> float:
    if epoch < s.warmup:
        return s.min_lr + (s.lr - s.min_lr) * epoch / s.warmup
    progress = (epoch - s.warmup) / max(1, s.epochs - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * min(1, progress))) / 2


@torch.no_grad()
def fill_bank(run: Run, views: Views) -> None:
    """Keys of the untrained encoder: with a bank that still fills, the loss would rise at first."""
    s = run.settings
    options = {"workers": s.workers, "part": (run.rank, run.world)}
    batches = views.batches(s.batch_size, epoch=0, **options)
    for _, view, label in itertools.islice(batches, math.ceil(s.bank / s.batch_size)):
        view, label = run.to_device(view, label)
        with run.autocast():
            key = run.momentum(view)
        run.criterion.enqueue(key, label)


def train_epoch(run: Run, views: Views, bar: tqdm) -> dict:
    """One pass over the images; returns the epoch's means, learning rate and speed."""
    s = run.settings
    options = {"workers": s.workers, "part": (run.rank, run.world)}
    loader = views.batches(s.batch_size, epoch=run.epoch + 1, **options)
    rows, start = [], time.perf_counter()
    for step, batch in enumerate(loader):
        lr = learning_rate(s, run.epoch + step / len(loader))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        with torch.no_grad():  # as in the released code, the key encoder moves before it is used
            for slow, fast in zip(run.momentum.parameters(), run.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - s.ema)

        batch = run.to_device(*batch)  # two views (B, C, H, W) and labels (B,), B of this process
        label, keys = batch[-1], []
        for x1, x2, y in zip(*(t.chunk(s.accumulate) for t in batch), strict=True):
            # Gradients are averaged over the processes in the last pass of a step.
            run.online.require_backward_grad_sync = len(keys) + 1 == s.accumulate
            with run.autocast():
                z1, z2, q1, q2 = run.online(x1, x2)  # (B / accumulate, D)
                with torch.no_grad():
                    key1, key2 = run.momentum(x1), run.momentum(x2)
            # Both directions of every pass see the bank as it was before this step.
            loss1, row1 = contrast(run, q1, key2, z1, y)
            loss2, row2 = contrast(run, q2, key1, z2, y)
            loss = (loss1 + loss2) / 2
            run.scaler.scale(loss / s.accumulate).backward()
            keys.append(key2)
            rows += [row1, row2]  # on the device: no wait in a step
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        run.criterion.enqueue(torch.cat(keys), label)  # one view's keys, once a step
        if step % 10 == 0:
            bar.set_postfix(epoch=run.epoch + 1, loss=f"{loss.item():.3f}", refresh=False)
        bar.update(s.batch_size)
    means = torch.stack(rows).mean(0)
    running = [b for m in (run.online, run.momentum) for b in m.buffers() if b.is_floating_point()]
    run.average(means, *running)
    means = dict(zip(("loss", *STATISTICS), means.tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss became {means['loss']} in epoch {run.epoch + 1}: lower --lr?")
    seconds = time.perf_counter() - start
    return means | {"lr": lr, "images_per_s": len(loader) * s.batch_size / seconds}


def contrast(run: Run, query, key, projection, label) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and it and STATISTICS as a vector; NaN where there is none, as purity at topk 0 or
    all but the fill of the bank where nothing is mined. The bank stays as it is."""
    memory, options = run.criterion.memory_bank, {"labels": label, "update": False}
    stats = {"bank_fill": memory.count / memory.size}
    if isinstance(run.criterion, PSMLoss):
        out = run.criterion(query, key, projection=projection, return_stats=True, **options)
        loss, stats = out.loss, vars(out.stats)
    else:
        loss = run.criterion(query, key, **options)
    values = (loss, *(stats.get(name) for name in STATISTICS))
    missing = torch.full_like(loss, math.nan)
    row = [(missing if v is None else v).detach().float().mean() for v in values]
    return loss, torch.stack(row)


def save(run: Run) -> None:
    """Everything needed to go on exactly; os.replace keeps the old file until the new is whole."""
    state = {name: getattr(run, name).state_dict() for name in PARTS}
    state["criterion"] = whole(state["criterion"])
    if run.rank != 0:
        return
    state |= {"settings": dataclasses.asdict(run.settings), "history": run.history}
    state |= {"python_rng": random.getstate(), "torch_rng": torch.get_rng_state()}
    state["cuda_rng"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    temporary = run.folder / "checkpoint.tmp"
    torch.save(state, temporary)
    os.replace(temporary, run.folder / "checkpoint.pt")


def whole(state: dict) -> dict:
    """With a divided bank's parts from all processes put together, on every process."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def load(path: Path, given: dict) -> tuple[dict, Settings]:
    """The saved state and its settings; those given on the command line must not contradict."""
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = Settings(**state["settings"])
    except Exception as error:  # of zip, pickle, keys or types: all mean the same
        raise UserError(f"{path} is damaged or not of this script") from error
    free = {f.name for f in dataclasses.fields(Settings) if f.metadata["free"]}
    other = [k for k, value in given.items() if k not in free and value != getattr(saved, k)]
    if other:
        text = ", ".join(f"{k} (saved {getattr(saved, k)}, given {given[k]})" for k in other)
        raise UserError(f"{path} has other settings: {text}")
    return state, dataclasses.replace(saved, **{k: v for k, v in given.items() if k in free})


def restore(run: Run, state: dict) -> None:
    try:
        for name in PARTS:
            getattr(run, name).load_state_dict(state[name])
        run.history, run.epoch = state["history"], len(state["history"])
        random.setstate(state["python_rng"])
        torch.set_rng_state(state["torch_rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{run.folder / 'checkpoint.pt'} is damaged") from error


def features(run: Run, module: nn.Module, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    batches = views.batches(run.settings.batch_size, workers=run.settings.workers)
    with run.autocast():
        return encode(module, batches, run.device)


def compare(run: Run, train: Views, test: Views) -> dict:
    """kNN and linear probes on the trained encoder, on an untrained one and on the pixels."""
    side = min(32, run.settings.image_size)
    modules = {
        "trained encoder": run.encoder[0],
        "random-initialized encoder": make_encoder(run.settings)[0].to(run.device),
        "raw pixels": nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()),
    }
    result = {}
    print(f"{'':28}{'kNN':>8}{'linear':>8}{'linear, 10 labels per class':>30}")
    for name, module in modules.items():
        sets = (*features(run, module, train), *features(run, module, test))
        scores = {"knn": knn_accuracy(*sets), "linear": linear_probe(*sets)}
        scores["linear_10"] = linear_probe(*sets, labels_per_class=10)
        print("{:28}{:8.2%}{:8.2%}{:30.2%}".format(name, *scores.values()))
        result[name] = scores
    return result


@torch.no_grad()
def draw(
    run: Run, bank: torch.Tensor, random_knn: float, views: Views, train: Views, test: Views
) -> dict:
    """curves.png, gradient.png and mined.png; returns the numbers behind the second."""
    s, folder = run.settings, run.folder
    plots.draw_curves(run.history, folder / "curves.png", random_knn=random_knn)

    batches = views.batches(min(1024, len(views)), epoch=s.epochs)
    view1, view2, _ = run.to_device(*next(iter(batches)))
    for module in (run.encoder, run.predictor, run.momentum):
        module.eval()
    query, key = run.predictor(run.encoder(view1)), run.momentum(view2)
    options = {"count": run.criterion.memory_bank.count, "temperature": s.temperature}
    gradient = rank_gradient_stats(query, key, bank, **options)
    plots.draw_gradient(*gradient, folder / "gradient.png")

    query, _ = features(run, nn.Sequential(run.encoder, run.predictor), test)
    key, bank = features(run, run.momentum, test)[0], features(run, run.momentum, train)[0]
    keep = None if s.method != "psm" or s.selection == "all" else (s.a, s.b)
    rows = (query[:8], key[:8], bank[: s.bank])
    options = {"topk": s.topk, "keep": keep, "mean_std": MEAN_STD[s.data]}
    plots.draw_mined(test, train, *rows, folder / "mined.png", **options)
    return {name: value.tolist() for name, value in gradient._asdict().items()}


def write_json(path: Path, *rows: dict) -> None:
    """One object a line; NaN, which JSON has not, as null."""
    plain = [json.loads(json.dumps(row), parse_constant=lambda _: None) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))


def log(run: Run, bar: tqdm, writer) -> None:
    """The last epoch: a line for the eye, metrics.jsonl, TensorBoard."""
    row = run.history[-1]
    write_json(run.folder / "metrics.jsonl", *run.history)
    if writer:
        for name, value in row.items():
            writer.add_scalar(name, value, row["epoch"])
    text = "epoch {epoch:3}  loss {loss:.4f}  kNN {knn:.2%}  "
    if run.settings.method == "psm":
        text += "purity {positive_purity:.1%}  kept {kept:.1%}  "
        text += "gradient {grad_mean:.2e}, variance {grad_var:.2e}  "
    bar.write((text + "bank {bank_fill:.0%}  lr {lr:.4f}").format(**row))


def start(given: dict) -> tuple[Run, Views, Views, Views]:
    """A new or resumed run, its random views, plain training and test images. Nothing is written
    before all is known to fit."""
    *_, defaults = METHODS[given.get("method", Settings.method)]
    recipe = RECIPES.get(given.get("data", Settings.data), {})
    s = Settings(**(defaults | recipe | given))
    s.name = s.name or f"{s.data}-{s.method}"
    folder, state = Path(s.runs) / s.name, None
    if s.resume:
        state, s = load(folder / "checkpoint.pt", given | {"name": s.name, "runs": s.runs})
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists: --resume continues it, --name NAME makes another")
    check(s, given)
    options = {"download": s.download, "limit": s.limit}
    images = [load_images(s.data, s.data_dir, train=part, **options) for part in (True, False)]
    if len(images[0]) < s.batch_size:
        raise UserError(f"batch_size: got {s.batch_size} for {len(images[0])} training images")
    augment, plain = transforms(s.data, s.image_size)
    views = Views(images[0], [augment, augment], s.seed)
    try:
        run = Run(s)
    except (ValueError, RuntimeError) as error:  # of the loss or of the device
        raise UserError(str(error).splitlines()[0]) from error
    if state:
        restore(run, state)
    else:
        fill_bank(run, views)
        if run.rank == 0:  # the others have looked for the folder: they helped to fill the bank
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", dataclasses.asdict(s))
        save(run)
    return run, views, Views(images[0], [plain]), Views(images[1], [plain])


def train(run: Run, views: Views, train: Views, test: Views) -> None:
    writer, first = None, run.rank == 0  # the first process evaluates, prints and writes
    with contextlib.suppress(ImportError):  # TensorBoard is optional
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.folder, purge_step=run.epoch + 1) if first else None
    s, backbone, begin = run.settings, run.encoder[0], time.perf_counter()
    images = len(views) // s.batch_size * s.batch_size  # in an epoch of full batches
    size = {"total": s.epochs * images, "initial": run.epoch * images}
    # None: no bar into a file
    with tqdm(**size, unit="img", unit_scale=True, disable=None if first else True) as bar:
        while run.epoch < s.epochs:
            row = {"epoch": run.epoch + 1, "knn": math.nan, **train_epoch(run, views, bar)}
            if first:
                sets = *features(run, backbone, train), *features(run, backbone, test)
                row["knn"] = knn_accuracy(*sets)
            run.epoch += 1
            run.history.append(row)
            save(run)
            if first:
                log(run, bar, writer)
    bank = whole(run.criterion.state_dict())["memory_bank.bank"]
    if not first:
        return
    result = {**run.history[-1], "settings": dataclasses.asdict(s)}
    if s.probe:
        result["accuracy"] = compare(run, train, test)
        random_knn = result["accuracy"]["random-initialized encoder"]["knn"]
        result["gradient"] = draw(run, bank, random_knn, views, train, test)
    write_json(run.folder / "result.json", result)
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {run.folder}")


def main(argv: list[str] | None = None) -> int:
    try:
        given = command_line(argv)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            minutes = given.get("timeout", Settings.timeout)
            dist.init_process_group(timeout=timedelta(minutes=minutes))
        train(*start(given))
    except (UserError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
        print(
            f"\nstopped; to continue after the last full epoch: {again} --resume", file=sys.stderr
        )
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
