"""The pictures of a training run. matplotlib is imported when one is drawn, not before."""

from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from psm_kernels.noise import keep_probability

BLUE, ORANGE, GREEN, RED, GREY = "#3b6ea8", "#d97b29", "#3f8f55", "#c0433c", "#8a8a8a"


def _figure(width: float, height: float, **grid):
    from matplotlib.figure import Figure  # no pyplot: the user's backend stays as it is

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**grid)
    return figure, axes


def draw_curves(history: list[dict], path: str | Path, *, random_knn: float | None = None) -> None:
    """Loss, kNN accuracy, purity of the mined positives and share of kept negatives by epoch."""
    figure, axes = _figure(10, 6, nrows=2, ncols=2, sharex=True)
    panels = (
        ("loss", "loss", BLUE),
        ("knn", "kNN accuracy", GREEN),
        ("positive_purity", "purity of mined positives", ORANGE),
        ("kept", "share of negatives kept", RED),
    )
    epochs = [row["epoch"] for row in history]
    for axis, (key, title, color) in zip(axes.flat, panels, strict=True):
        values = [float("nan") if row[key] is None else row[key] for row in history]
        axis.plot(epochs, values, color=color, marker="o", markersize=3)
        axis.set_title(title, fontsize=11, loc="left")
        _clean(axis)
    if random_knn is not None:
        axes[0, 1].axhline(random_knn, color=GREY, linestyle="--", linewidth=1)
        axes[0, 1].annotate(
            "random-initialized encoder",
            (1, random_knn),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    for axis in axes[1]:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def draw_gradient(
    mean: torch.Tensor,  # (R,)
    var: torch.Tensor,  # (R,)
    positive_rank: float,
    path: str | Path,
) -> None:
    """Gradient mean and variance of the negatives by rank, each divided by its maximum."""
    figure, axis = _figure(7.5, 4.2)
    ranks = range(1, len(mean) + 1)
    for values, label, color in ((mean, "mean", BLUE), (var, "variance", ORANGE)):
        values = values.detach().cpu()
        axis.plot(
            ranks, values / values.max(), color=color, label=f"{label} (max {values.max():.3g})"
        )
    axis.axvline(
        positive_rank,
        color=GREEN,
        linestyle="--",
        linewidth=1,
        label=f"mean rank of the positive ({positive_rank:.1f})",
    )
    axis.set_xlim(1, max(len(mean), positive_rank + 1))
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("rank of the negative by similarity to the query (1 = hardest)")
    axis.set_ylabel("divided by its maximum")
    axis.set_title("Gradient of the loss in the similarity of a negative", fontsize=11, loc="left")
    axis.legend(frameon=False)
    _clean(axis)
    figure.savefig(path, dpi=120)


def draw_mined(
    queries: Dataset,
    pool: Dataset,
    query: torch.Tensor,  # (Q, D)
    key: torch.Tensor,  # (Q, D)
    bank: torch.Tensor,  # (N, D)
    path: str | Path,
    *,
    topk: int,
    keep: tuple[float, float] | None,
    mean_std: tuple[tuple, tuple],
    negatives: int = 4,
) -> None:
    """One query a line: its mined positives, then some of its kept and dropped negatives.

    Args:
        queries, pool: data sets of (normalized image (C, H, W), label); row i of `query` and `key`
            comes from image i of the first, row j of `bank` from image j of the second.
        query, key, bank: embeddings; normalized here.
        path: the PNG to write.
        topk: mined positives, the bank rows closest to the key.
        keep: a and b of the negative selection, None when every negative is kept.
        mean_std: of the normalization, undone for the picture.
        negatives: kept and dropped ones shown of each, drawn at random, most similar first.
    """
    query, key, bank = (F.normalize(x.detach().float().cpu(), dim=1) for x in (query, key, bank))
    similarity = query @ bank.T  # (Q, N)
    mined = (key @ bank.T).topk(min(topk, len(bank))).indices  # (Q, topk)
    generator = torch.Generator().manual_seed(0)
    chance = torch.ones_like(similarity)
    if keep is not None:
        chance = keep_probability(similarity, (query * key).sum(1, keepdim=True), *keep)
    kept = torch.rand(similarity.shape, generator=generator) < chance

    groups = {"mined positives": topk, "kept negatives": negatives, "dropped negatives": negatives}
    if kept.all():
        groups["dropped negatives"] = 0
    groups = {title: count for title, count in groups.items() if count}
    ratios = [1, *(w for count in groups.values() for w in (0.3, *[1] * count))]
    figure, axes = _figure(
        0.85 * sum(ratios),
        1.05 * len(query) + 0.6,
        nrows=len(query),
        ncols=len(ratios),
        squeeze=False,
        gridspec_kw={"width_ratios": ratios},
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, line in enumerate(axes):
        image, label = queries[i]
        _draw_image(line[0], image, mean_std, GREY)
        others = torch.randperm(len(bank), generator=generator)
        others = others[~torch.isin(others, mined[i])]
        shown = {"mined positives": mined[i]}
        for title, mask in (("kept negatives", kept[i]), ("dropped negatives", ~kept[i])):
            some = others[mask[others]][:negatives]
            shown[title] = some[similarity[i, some].argsort(descending=True)]
        column = 2  # after the query and a gap
        for title, count in groups.items():
            if i == 0:
                line[column].set_title(title, fontsize=9, loc="left", pad=6)
            for axis, j in zip(line[column:], shown[title].tolist(), strict=False):
                image, other = pool[j]
                _draw_image(axis, image, mean_std, GREEN if other == label else RED)
                axis.set_xlabel(f"{similarity[i, j]:.2f}", fontsize=7, labelpad=2)
            column += count + 1
    axes[0, 0].set_title("query", fontsize=9, loc="left", pad=6)
    figure.supxlabel(
        "number: cosine similarity to the query     frame: green = same class, red = another class",
        fontsize=8,
        color=GREY,
    )
    figure.savefig(path, dpi=120)


def _draw_image(axis, image: torch.Tensor, mean_std: tuple[tuple, tuple], color: str) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_std)
    image = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)  # (H, W, C)
    axis.imshow(image.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=2)


def _clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
