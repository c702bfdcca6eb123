"""Train a ResNet without labels by PSM or another method: python train.py

    python train.py                                       digits: no download, minutes on two cores
    python train.py --data fashionmnist --download        60,000 images, an hour on two cores
    python train.py --data cifar10 --download --amp bf16  the released recipe, for a GPU
    python train.py --resume                              go on where an interrupted run stopped
    torchrun --nproc-per-node 8 train.py --shard-bank     many processes, the bank divided
    python train.py --help                                every setting

Each run leaves settings, metrics.jsonl, result.json, checkpoint.pt and pictures in runs/<name>/.
Read from top to bottom: settings, networks, training, evaluation, main. psm_kernels/training has
images and augmentations, layers, checkpoints and pictures.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from psm_kernels import losses, rank_gradient_stats
from psm_kernels.bank.collectives import average, rank_and_world
from psm_kernels.evaluate import compare, encode, knn_accuracy
from psm_kernels.training import plots
from psm_kernels.training.batch_norm import set_batch_norm
from psm_kernels.training.checkpoint import full_state_dict, load_checkpoint, save_checkpoint
from psm_kernels.training.data import DATA_SETS, MEAN_STD, load_views
from psm_kernels.training.networks import ARCHITECTURES, make_encoder, mlp
from psm_kernels.training.settings import check, command_line, complete, continued, setting

METHODS = {  # another method is one more line, and its own settings below
    "psm": losses.PSMLoss,
    "sscl": losses.SSCLLoss,
    "unremix": losses.UnReMixLoss,
    "hcl": losses.HCLLoss,
    "infonce": losses.InfoNCELoss,
    "nnclr": losses.NNCLRLoss,
    "supcon": losses.SupConLoss,  # the one that learns from the labels
    "ressl": losses.ReSSLLoss,
    "msf": losses.MSFLoss,
}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = ("loss", "positive_purity", "kept", "grad_mean", "grad_var", "bank_fill", "own_copies")


@dataclass
class Settings:
    """The command line. Defaults: the recipe released with PSM; RECIPES: what differs."""

    data: str = setting("digits", "data set", choices=DATA_SETS)
    data_dir: str = setting("data", "folder of the data; imagefolder: of train/, val/", free=True)
    download: bool = setting(False, "fetch a missing data set into data_dir", free=True)
    workers: int = setting(0, "processes that load images", least=0, free=True)
    limit: int = setting(0, "use that many training and test images, 0: all", least=0)
    holdout: int = setting(0, "evaluate on that many training images, not trained on", least=0)
    image_size: int = setting(32, "side of the training crops", least=1)
    name: str = setting("", "run folder, default <data>-<method>", free=True)
    runs: str = setting("runs", "folder of the run folders", free=True)
    resume: bool = setting(False, "continue runs/<name> from its checkpoint", free=True)
    device: str = setting("auto", "cpu, cuda, ...; auto: a GPU if there is one", free=True)
    seed: int = setting(0, "of weights, augmentations and the noise of the loss", least=0)

    arch: str = setting("resnet18", "encoder", choices=ARCHITECTURES)
    stem: str = setting("small", "first layers: 3x3 or ImageNet's", choices=("small", "large"))
    dim: int = setting(128, "dimension of queries and keys", least=1)
    ema: float = setting(0.99, "momentum of the key encoder", least=0, most=1)

    method: str = setting("psm", "loss", choices=tuple(METHODS))
    temperature: float = setting(0.5, "of the loss", of=[m for m in METHODS if m != "msf"])
    bank: int = setting(16384, "slots of the memory bank", least=1)
    indexed_bank: bool = setting(False, "one slot for each training image instead")
    topk: int = setting(5, "mined positives per query; msf: its own key is one", of=["psm", "msf"])
    a: float = setting(0.5, "density of the selection of negatives", of=["psm"])
    b: float = setting(0.0, "peak of it relative to the positive's similarity", of=["psm"])
    selection: str = setting("bernoulli", "of negatives: bernoulli, expected or all", of=["psm"])
    soft_weights: str = setting("attention", "of positives: attention, uniform, binary", of=["psm"])
    hard_weight: float = setting(1.0, "of the augmented view's own loss", of=["psm"])
    beta: float = setting(1.0, "concentration on hard negatives", of=["hcl", "sscl"])
    tau_plus: float = setting(0.1, "share of false negatives", of=["hcl", "sscl"])
    num_hard: int = setting(32, "nearest negatives to mix from", of=["sscl"])
    num_synthetic: int = setting(8, "mixed negatives per query", of=["sscl"])
    mix: str = setting("pair", "pair, query or none", of=["sscl"])
    teacher_temperature: float = setting(0.04, "of the target", of=["ressl"])
    similarity_weight: float = setting(1 / 3, "of similarity to the query", of=["unremix"])
    uncertainty_weight: float = setting(1 / 3, "of the gradient's size", of=["unremix"])
    representativeness_weight: float = setting(1 / 3, "of distance to others", of=["unremix"])

    epochs: int = setting(200, "passes over the training images", least=1)
    batch_size: int = setting(256, "images per optimizer step", least=2)
    accumulate: int = setting(1, "split a batch into that many passes to save memory", least=1)
    lr: float = setting(0.1, "peak learning rate", least=0)
    min_lr: float = setting(1e-4, "where warm-up starts and the cosine ends", least=0)
    warmup: int = setting(20, "epochs of linear warm-up", least=0)
    weight_decay: float = setting(1e-3, "of every parameter", least=0)
    amp: str = setting("none", "autocast of the networks", choices=tuple(AMP))
    compile: bool = setting(False, "torch.compile the networks")
    shard_bank: bool = setting(False, "divide the bank among torchrun's processes", free=True)
    sync_bn: bool = setting(False, "batch norm over all processes; needs GPUs")
    bn_splits: int = setting(1, "normalize as that many processes do, each its part", least=1)
    timeout: int = setting(30, "minutes to wait for another process", least=1, free=True)
    probe: bool = setting(True, "end with linear probes and pictures", free=True)


RECIPES = {  # defaults that depend on the data or the method
    "digits": {"image_size": 8, "bank": 1024, "batch_size": 64, "epochs": 16, "warmup": 1}
    | {"ema": 0.97},  # 350 steps in all: a slower key encoder would lag behind
    "fashionmnist": {"image_size": 28, "arch": "resnet8", "dim": 64, "bank": 4096, "epochs": 10}
    | {"warmup": 1, "lr": 0.3, "weight_decay": 5e-4},
    "tinyimagenet": {"image_size": 64, "stem": "large"},  # as released; small is 10 times the work
    "imagefolder": {"image_size": 224, "stem": "large"},
    "sscl": {"tau_plus": 0.05},
    "infonce": {"temperature": 0.2},
    "nnclr": {"temperature": 0.2},
    "supcon": {"temperature": 0.1},
    "ressl": {"temperature": 0.1},
}


class UserError(Exception):
    """Ends the run with one line on stderr and exit status 2."""


class Networks(nn.Module):
    """The encoder and its predictor learn; the momentum encoder follows it and makes the keys."""

    def __init__(self, s: Settings):
        super().__init__()
        torch.manual_seed(s.seed)  # it alone decides the weights
        channels = len(MEAN_STD[s.data][0])
        self.encoder = make_encoder(s.arch, s.dim, stem=s.stem, channels=channels)
        self.predictor = mlp(s.dim, s.dim)
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, view1, view2):
        """Projections z, queries q and keys k of both views, (B, D) each; no gradient in k."""
        z1, z2 = self.encoder(view1), self.encoder(view2)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            k1, k2 = self.momentum(view1), self.momentum(view2)
        return z1, z2, q1, q2, k1, k2

    @torch.no_grad()
    def follow(self, ema: float) -> None:
        for slow, fast in zip(self.momentum.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - ema)


class Run:
    """All that a training consists of: images, networks, loss, optimizer and its history."""

    def __init__(self, s: Settings):
        self.settings, self.folder, self.history = s, Path(s.runs) / s.name, []
        self.rank, self.world = rank_and_world()
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(gpu if s.device == "auto" else s.device)
        self.autocast = torch.autocast(self.device.type, AMP[s.amp], enabled=s.amp != "none")

        passes = s.accumulate * self.world * s.bn_splits
        if s.batch_size % passes or s.batch_size < 2 * passes:
            wanted = f"a multiple of accumulate x processes x bn_splits ({passes}), 2 in each"
            raise ValueError(f"batch_size: got {s.batch_size}, wanted {wanted}")
        options = {"seed": s.seed, "download": s.download, "limit": s.limit, "holdout": s.holdout}
        self.views, train, test = load_views(s.data, s.data_dir, s.image_size, **options)
        self.steps = len(train) // s.batch_size  # of an epoch
        if self.steps == 0:
            raise ValueError(f"batch_size: got {s.batch_size} for {len(train)} training images")
        self.train_set = train.batches(s.batch_size, workers=s.workers)
        self.test_set = test.batches(s.batch_size, workers=s.workers)

        networks = Networks(s).to(self.device)
        self.networks = set_batch_norm(networks, sync=s.sync_bn, splits=s.bn_splits)
        options = {f.name: getattr(s, f.name) for f in fields(s) if s.method in f.metadata["of"]}
        options["shard_bank" if s.shard_bank else "gather_distributed"] = True
        options |= {"indexed_bank": s.indexed_bank, "seed": s.seed}
        slots = len(train) if s.indexed_bank else s.bank
        criterion = METHODS[s.method](memory_bank_size=(slots, s.dim), **options)
        self.criterion = criterion.to(self.device)
        learned = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learned, s.lr, momentum=0.9, weight_decay=s.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s.amp == "fp16")
        others = {"criterion": self.criterion, "optimizer": self.optimizer, "scaler": self.scaler}
        self.parts = dict(self.networks.named_children()) | others  # of a checkpoint

        if s.compile:
            for network in self.networks.children():
                network.compile()
        self.model = self.networks
        if self.world > 1:  # batch norm: of each process alone, averaged at the end of an epoch
            ddp = nn.parallel.DistributedDataParallel
            self.model = ddp(self.networks, broadcast_buffers=False)

    def batches(self, epoch: int):
        """Two random views (B, C, H, W), labels and indices (B,): this process's part of each
        batch."""
        s, part = self.settings, (self.rank, self.world)
        for batch in self.views.batches(s.batch_size, epoch=epoch, workers=s.workers, part=part):
            yield [t.to(self.device, non_blocking=True) for t in batch]

    def save(self) -> None:
        more = {"settings": vars(self.settings), "history": self.history}
        save_checkpoint(self.folder / "checkpoint.pt", self.parts, **more)


def learning_rate(s: Settings, epoch: float) -> float:
    if epoch < s.warmup:
        return s.min_lr + (s.lr - s.min_lr) * epoch / s.warmup
    progress = (epoch - s.warmup) / max(1, s.epochs - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * min(1, progress))) / 2


@torch.no_grad()
def fill_bank(run: Run) -> None:
    """Keys of the untrained encoder: with a bank that still fills, the loss would rise at first."""
    steps = math.ceil(run.criterion.memory_bank.size / run.settings.batch_size)
    for _, view, label, index in itertools.islice(run.batches(epoch=0), steps):
        with run.autocast:
            key = run.networks.momentum(view)
        run.criterion.enqueue(key, label, ids=index)


def train_epoch(run: Run, bar: tqdm) -> dict:
    """One pass over the images; returns the epoch's means, learning rate and speed."""
    s, epoch, rows, begin = run.settings, len(run.history), [], time.perf_counter()
    for step, batch in enumerate(run.batches(epoch + 1)):
        lr = learning_rate(s, epoch + step / run.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        rows.append(train_step(run, *batch))  # on the device: no wait in a step
        if step % 10 == 0:
            loss = f"{rows[-1][:, 0].mean():.3f}"
            bar.set_postfix(epoch=epoch + 1, loss=loss, refresh=False)
        bar.update(s.batch_size)
    means = torch.cat(rows).mean(0)
    average(means, *(b for b in run.networks.buffers() if b.is_floating_point()))
    means = dict(zip(METRICS, means.tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss became {means['loss']} in epoch {epoch + 1}: lower --lr?")
    speed = run.steps * s.batch_size / (time.perf_counter() - begin)
    return means | {"lr": lr, "images_per_s": speed}


def train_step(run: Run, view1, view2, label, index) -> torch.Tensor:
    """One step of the optimizer; returns METRICS of each pass."""
    run.networks.follow(run.settings.ema)  # as in the released code, before it makes the keys
    passes, rows, keys = run.settings.accumulate, [], []
    for x1, x2, y, n in zip(*(t.chunk(passes) for t in (view1, view2, label, index)), strict=True):
        # Gradients are averaged over the processes in the last pass of a step.
        run.model.require_backward_grad_sync = len(keys) + 1 == passes
        with run.autocast:
            z1, z2, q1, q2, k1, k2 = run.model(x1, x2)  # (B / passes, D)
        # Both directions of every pass see the bank as it was before this step.
        loss, row = contrast(run.criterion, (q1, k2, q2, k1), (z1, z2), labels=y, ids=n)
        run.scaler.scale(loss / passes).backward()
        rows.append(row)
        keys.append(k2)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.criterion.enqueue(torch.cat(keys), label, ids=index)  # one view's keys, once a step
    return torch.stack(rows)


def contrast(criterion, pairs, projection, **rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and METRICS as a vector; NaN where there is none, as purity at topk 0 or all but
    what concerns the bank where nothing is mined. The bank stays as it is."""
    options, bank = rows | {"update": False}, criterion.memory_bank
    if isinstance(criterion, losses.PSMLoss):
        options |= {"projection": projection, "return_stats": True}
        loss, stats = criterion.symmetric(*pairs, **options)
        found = vars(stats)
    else:
        loss = criterion.symmetric(*pairs, **options)
        found = {"bank_fill": bank.count / bank.size, "own_copies": bank.copies(rows["ids"])}
    missing = torch.full_like(loss, math.nan)
    values = [loss, *(found.get(name) for name in METRICS[1:])]
    row = [(missing if value is None else value).detach().float().mean() for value in values]
    return loss, torch.stack(row)


@torch.no_grad()
def evaluate(run: Run, bank: dict[str, torch.Tensor]) -> dict:
    """Accuracy next to an untrained encoder's and the pixels', and three pictures."""
    s, folder, networks = run.settings, run.folder, run.networks.eval()
    encoders = {
        "trained encoder": networks.encoder[0],
        "random-initialized encoder": Networks(s).encoder[0].to(run.device),
        "raw pixels": nn.Sequential(nn.AdaptiveAvgPool2d(min(32, s.image_size)), nn.Flatten()),
    }
    with run.autocast:
        accuracy = compare(encoders, run.train_set, run.test_set, device=run.device)
    print(f"{'':28}{'kNN':>8}{'linear':>8}{'linear, 10 labels per class':>30}")
    for name, scores in accuracy.items():
        print("{:28}{knn:8.2%}{linear:8.2%}{linear_10:30.2%}".format(name, **scores))
    random_knn = accuracy["random-initialized encoder"]["knn"]
    plots.draw_curves(run.history, folder / "curves.png", random_knn=random_knn)

    batch = next(iter(run.views.batches(min(1024, len(run.views)), epoch=s.epochs)))
    view1, view2, _, index = (t.to(run.device) for t in batch)
    _, _, query, _, _, key = networks(view1, view2)
    options = {"count": run.criterion.memory_bank.extent, "temperature": s.temperature}
    options |= {"ids": index, "bank_ids": bank["ids"]}
    gradient = rank_gradient_stats(query, key, bank["bank"], **options)
    plots.draw_gradient(*gradient, folder / "gradient.png")

    images = next(iter(run.test_set))[0][:8].to(run.device)
    _, _, query, _, _, key = networks(images, images)
    pool = itertools.islice(run.train_set, math.ceil(s.bank / s.batch_size))
    pool = encode(networks.momentum, pool, run.device)[0][: s.bank]
    keep = None if s.method != "psm" or s.selection == "all" else (s.a, s.b)
    options = {"topk": s.topk, "keep": keep, "mean_std": MEAN_STD[s.data]}
    sets = run.test_set.dataset, run.train_set.dataset
    plots.draw_mined(*sets, query, key, pool, folder / "mined.png", **options)
    gradient = {name: value.tolist() for name, value in gradient._asdict().items()}
    return {"accuracy": accuracy, "gradient": gradient}


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
    text += "bank {bank_fill:.0%}  own copies {own_copies:.2f}  lr {lr:.4f}"
    bar.write(text.format(**row))


def train(run: Run) -> None:
    """The epochs that are left, then the evaluation."""
    s, begin, writer = run.settings, time.perf_counter(), None
    first = run.rank == 0  # it evaluates, prints and writes
    if first:
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(run.folder, purge_step=len(run.history) + 1)
    images = run.steps * s.batch_size  # in an epoch of full batches
    size = {"total": s.epochs * images, "initial": len(run.history) * images}
    # None: no bar into a file
    with tqdm(**size, unit="img", unit_scale=True, disable=None if first else True) as bar:
        while len(run.history) < s.epochs:
            row = {"epoch": len(run.history) + 1, "knn": math.nan, **train_epoch(run, bar)}
            if first:
                backbone, device = run.networks.encoder[0], run.device
                with run.autocast:
                    sets = [encode(backbone, x, device) for x in (run.train_set, run.test_set)]
                row["knn"] = knn_accuracy(*sets[0], *sets[1])
            run.history.append(row)
            run.save()
            if first:
                log(run, bar, writer)
    bank = full_state_dict(run.criterion.memory_bank)
    if not first:
        return
    result = {**run.history[-1], "settings": vars(s)}
    if s.probe:
        result |= evaluate(run, bank)
    write_json(run.folder / "result.json", result)
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {run.folder}")


def start(argv: list[str] | None) -> Run:
    """A new or resumed run. Nothing is written before all is known to fit."""
    try:
        given = command_line(Settings, argv, about=__doc__, recipes=RECIPES)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            minutes = given.get("timeout", Settings.timeout)
            dist.init_process_group(timeout=timedelta(minutes=minutes))
        s = complete(Settings, given, RECIPES)
        s.name = s.name or f"{s.data}-{s.method}"
        folder, path = Path(s.runs) / s.name, Path(s.runs) / s.name / "checkpoint.pt"
        if s.resume:
            saved = load_checkpoint(path)["settings"]
            s = continued(Settings, saved, given | {"name": s.name, "runs": s.runs})
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists: --resume continues it, --name NAME makes another")
        check(s, given)
        run = Run(s)
        if s.resume:
            run.history = load_checkpoint(path, run.parts)["history"]
    except (ValueError, RuntimeError, FileNotFoundError) as error:  # RuntimeError: of the device
        raise UserError(str(error).splitlines()[0]) from error
    if not s.resume:
        fill_bank(run)
        if run.rank == 0:  # the others have looked for the folder: they helped to fill the bank
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", vars(s))
        run.save()
    return run


def main(argv: list[str] | None = None) -> int:
    try:
        train(start(argv))
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
        print(f"\nstopped; to go on after the last full epoch: {again} --resume", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
