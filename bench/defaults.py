"""How BayesAgg's defaults were chosen: trainings on four small data sets, over learning rates, seeds and options.

    python -m bench.defaults run --dataset river --method bayesagg --options "gamma=1 power=0.1" --lr 1e-3 8e-3
    python -m bench.defaults summary --write bench/results/defaults/bayesagg.csv

Shared bottoms of two layers, Adam with a cosine schedule, batches of 128. Methods are compared on the test rows, at the
learning rate with the least validation error. QM9 needs the package qm9pack.
"""

from __future__ import annotations

import argparse
import ast
import csv
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import mtlgrad
from mtlgrad.data import qm9 as recipe

PACKAGED = Path(mtlgrad.__file__).parent / "data"
WIDTH, BATCH = 64, 128
METHODS = ("sum", "logsum", "uncertainty", "single", "bayesagg")
COLUMNS = ("dataset", "method", "options", "lr", "epochs", "seed", "split", "task", "metric", "value")
RUN = COLUMNS[:6]  # what names a run


# ---- data


@dataclass(frozen=True)
class Head:
    """The tasks of one layer: O regressions, O binary labels, or one choice between O classes."""

    kind: str  #: regression, binary or multiclass
    tasks: list[str]
    outputs: int
    targets: Tensor  #: [N, O] float32; multiclass [N] int64


@dataclass(frozen=True)
class Data:
    """A data set, standardised, with its split."""

    inputs: Tensor  #: [N, ...], one row each
    heads: list[Head]
    rows: dict[str, Tensor]  #: train, validation, test
    epochs: int
    backbone: Callable[[], nn.Module]

    def batches(self, order: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield inputs and each head's targets."""
        for rows in order.split(BATCH):
            yield self.inputs[rows], [head.targets[rows] for head in self.heads]


def random_split(count: int, train: int, validation: int, test: int) -> dict[str, Tensor]:
    """Draw rows, the same at every call."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    return {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation : train + validation + test],
    }


def by_parts(count: int) -> dict[str, Tensor]:
    """Split 60/10/30."""
    train, validation = int(0.6 * count), int(0.1 * count)
    return random_split(count, train, validation, count - train - validation)


def standardised(values: Tensor, train: Tensor) -> Tensor:
    """Scale columns to the training rows' mean 0 and deviation 1; NaN becomes the mean."""
    mean = values[train].nanmean(0)
    values = torch.where(values.isnan(), mean, values)
    return ((values - mean) / values[train].std(0).clamp_min(1e-6)).float()


def perceptron(inputs: int) -> Callable[[], nn.Module]:
    """Make the maker of inputs -> 128 -> 64."""
    return lambda: nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU())


def river(folder: Path) -> Data:
    """Read RF1: eight flows of one river network, 48 hours ahead."""
    file = np.load(folder / "river_flow.npz")
    inputs, targets = torch.from_numpy(file["inputs"]), torch.from_numpy(file["targets"])
    rows = by_parts(len(inputs))
    head = Head("regression", file["target_names"].tolist(), targets.shape[1], standardised(targets, rows["train"]))
    return Data(standardised(inputs, rows["train"]), [head], rows, 40, perceptron(inputs.shape[1]))


def yeast(folder: Path) -> Data:
    """Read the 14 labels of yeast genes."""
    file = np.load(folder / "yeast.npz")
    inputs, labels = torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"]).float()
    rows = by_parts(len(inputs))
    head = Head("binary", [f"label {i}" for i in range(labels.shape[1])], labels.shape[1], labels)
    return Data(standardised(inputs, rows["train"]), [head], rows, 30, perceptron(inputs.shape[1]))


def clothing(folder: Path) -> Data:
    """Read reviews as rows of word ids, padded with 0: rating and age, recommended, department."""
    file = np.load(folder / "clothing_reviews.npz")
    tokens = torch.from_numpy(file["tokens"].astype("int64")) + 1
    lengths = torch.from_numpy(file["lengths"].astype("int64"))
    split = torch.from_numpy(file["split"].astype("int64"))
    inputs = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    inputs[torch.arange(inputs.shape[1]) < lengths[:, None]] = tokens
    rows = {name: (split == i).nonzero()[:, 0] for i, name in enumerate(("train", "validation", "test"))}
    numbers = torch.from_numpy(np.stack([file["rating"], file["age"]], 1).astype("float32"))
    heads = [
        Head("regression", ["rating", "age"], 2, standardised(numbers, rows["train"])),
        Head("binary", ["recommended"], 1, torch.from_numpy(file["recommended"].astype("float32"))[:, None]),
        Head("multiclass", ["department"], 6, torch.from_numpy(file["department"].astype("int64"))),
    ]
    words = len(file["vocabulary"]) + 1

    def backbone() -> nn.Module:
        # A row without tokens is a bag of zeros. Words start near 0: from N(0, 1) they would hardly move in 8 epochs.
        bag = nn.EmbeddingBag(words, WIDTH, mode="mean", padding_idx=0)
        nn.init.normal_(bag.weight, std=0.1)
        return nn.Sequential(bag, nn.Linear(WIDTH, WIDTH), nn.ReLU())

    return Data(inputs, heads, rows, 8, backbone)


def qm9(_: Path) -> Data:
    """Read 10,000 molecules and 11 properties; of energies what the composition does not tell."""
    molecules = recipe.molecules()
    targets, composition = molecules["targets"].clone(), molecules["composition"]
    rows = random_split(len(targets), 6_000, 1_000, 3_000)
    design = torch.cat([composition, torch.ones(len(targets), 1, dtype=torch.float64)], 1)
    energies = [list(recipe.PROPERTIES).index(name) for name in recipe.ENERGIES]
    fit = torch.linalg.lstsq(design[rows["train"]], targets[rows["train"]][:, energies]).solution
    targets[:, energies] -= design @ fit
    inputs = standardised(torch.cat([molecules["spectrum"], composition], 1), rows["train"])
    head = Head("regression", list(recipe.PROPERTIES), targets.shape[1], standardised(targets, rows["train"]))
    return Data(inputs, [head], rows, 30, perceptron(inputs.shape[1]))


DATASETS: dict[str, Callable[[Path], Data]] = {"river": river, "yeast": yeast, "clothing": clothing, "qm9": qm9}


# ---- training


class Network(nn.Module):
    """A backbone and one linear layer per head."""

    def __init__(self, data: Data):
        super().__init__()
        self.backbone = data.backbone()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, head.outputs) for head in data.heads)
        self.kinds = [head.kind for head in data.heads]

    def losses(self, features: Tensor, targets: list[Tensor]) -> Tensor:
        """Compute the tasks' losses, [T]."""
        parts = zip(self.kinds, self.layers, targets, strict=True)
        return torch.cat([task_losses(kind, layer(features), target) for kind, layer, target in parts])


def task_losses(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the losses of one head's tasks, [O]; of classes, [1]."""
    if kind == "regression":
        return (outputs - targets).square().mean(0)
    if kind == "binary":
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(0)
    return functional.cross_entropy(outputs, targets)[None]


class Uncertainty(nn.Module):
    """Kendall's weights: a learned log variance for each task."""

    factors: Tensor

    def __init__(self, data: Data):
        super().__init__()
        factors = [0.5 if head.kind == "regression" else 1.0 for head in data.heads for _ in head.tasks]
        self.register_buffer("factors", torch.tensor(factors))
        self.log_variances = nn.Parameter(torch.zeros(len(factors)))

    def forward(self, losses: Tensor) -> Tensor:
        return (self.factors * (-self.log_variances).exp() * losses + 0.5 * self.log_variances).sum()


def parse_options(text: str) -> dict[str, Any]:
    """Read "noise=estimated gamma=1"."""

    def value(word: str) -> Any:
        try:
            return ast.literal_eval(word)
        except ValueError:
            return word

    return {name: value(word) for name, _, word in (item.partition("=") for item in text.split())}


def make_bayesagg(network: Network, options: dict[str, Any]) -> Any:
    """Make the layer; heads get gamma and power, regressions also noise and bias, the layer the rest."""
    makers: dict[str, Any] = {
        "regression": mtlgrad.Regression,
        "binary": mtlgrad.Binary,
        "multiclass": mtlgrad.Multiclass,
    }
    common = {name: options[name] for name in ("gamma", "power") if name in options}
    regression = {name: options[name] for name in ("noise", "bias") if name in options}
    heads = [
        makers[kind](layer, **common, **(regression if kind == "regression" else {}))
        for kind, layer in zip(network.kinds, network.layers, strict=True)
    ]
    rest = {name: value for name, value in options.items() if name not in ("gamma", "power", "noise", "bias")}
    return mtlgrad.BayesAgg(heads, **rest)


def train(data: Data, method: str, options: str, lr: float, seed: int, task: int | None = None) -> Network:
    """Train a network, for "single" on one task's loss alone."""
    torch.manual_seed(seed)
    network = Network(data)
    settings = parse_options(options)
    warmup = settings.pop("warmup", 1)
    uncertainty = Uncertainty(data) if method == "uncertainty" else None
    bayes = make_bayesagg(network, settings) if method == "bayesagg" else None
    parameters = [*network.parameters(), *(uncertainty.parameters() if uncertainty else ())]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.epochs)
    rows = data.rows["train"]
    for epoch in range(data.epochs):
        # The warm-up's last epoch gives the layer its first statistics; the layer is plain summation until refresh().
        layer = bayes if epoch >= warmup - 1 else None
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(100 * seed + epoch))]
        for inputs, targets in data.batches(order):
            optimizer.zero_grad()
            features = network.backbone(inputs)
            losses = network.losses(layer(features, targets) if layer else features, targets)
            if layer:
                total = layer.total(losses.unbind())
            elif method == "logsum":
                total = losses.log().sum()
            elif uncertainty:
                total = uncertainty(losses)
            else:
                total = losses.sum() if task is None else losses[task]
            total.backward()
            optimizer.step()
        if layer:
            layer.refresh()
        schedule.step()
    return network.eval()


# ---- evaluation

Metrics = dict[tuple[str, str, str], float]  # by split, task and metric


@torch.no_grad()
def evaluate(network: Network, data: Data) -> Metrics:
    """Measure every task on the validation and test rows."""
    features = {split: network.backbone(data.inputs[rows]) for split, rows in data.rows.items()}
    found: Metrics = {}
    for head, layer in zip(data.heads, network.layers, strict=True):
        refit = refitted(features["train"], head.targets[data.rows["train"]]) if head.kind == "regression" else None
        for split in ("validation", "test"):
            outputs, targets = layer(features[split]), head.targets[data.rows[split]]
            if refit is not None:
                metrics = {
                    "mae": (outputs - targets).abs().mean(0),
                    "mae_refit": (with_one(features[split]) @ refit - targets).abs().mean(0),
                }
            else:
                wrong = ((outputs > 0) != targets.bool()) if head.kind == "binary" else outputs.argmax(1) != targets
                metrics = {
                    "cross_entropy": task_losses(head.kind, outputs, targets),
                    "error": wrong.float().mean(0).reshape(-1),
                }
            for metric, values in metrics.items():
                for name, value in zip(head.tasks, values.tolist(), strict=True):
                    found[split, name, metric] = value
    return found


def with_one(features: Tensor) -> Tensor:
    """Append the bias' column, in float64."""
    return functional.pad(features.double(), (0, 1), value=1.0)


def refitted(features: Tensor, targets: Tensor) -> Tensor:
    """Fit linear heads by least squares, so that features are compared and not how far the heads have come."""
    design = with_one(features)
    gram = design.T @ design + 1e-3 * torch.eye(design.shape[1], dtype=torch.float64)
    heads: Tensor = torch.linalg.solve(gram, design.T @ targets.double())
    return heads


def measure(data: Data, method: str, options: str, lr: float, seed: int) -> Metrics:
    """Train and evaluate; for "single" a network per task."""
    if method != "single":
        return evaluate(train(data, method, options, lr, seed), data)
    found: Metrics = {}
    for i, name in enumerate(task for head in data.heads for task in head.tasks):
        metrics = evaluate(train(data, method, options, lr, seed, task=i), data)
        found |= {key: value for key, value in metrics.items() if key[1] == name}
    return found


def run(args: argparse.Namespace) -> None:
    """Append the rows of the runs that the file does not have yet."""
    torch.set_num_threads(1)
    data = DATASETS[args.dataset](args.data)
    done = {tuple(row[name] for name in RUN) for row in read_rows(args.out)}
    for lr in args.lr:
        for seed in range(args.seeds):
            key = (args.dataset, args.method, args.options, f"{lr:g}", str(data.epochs), str(seed))
            if key in done:
                continue
            start = time.perf_counter()
            metrics = measure(data, args.method, args.options, lr, seed)
            with open(args.out, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(COLUMNS)
                writer.writerows([*key, *where, f"{value:.6g}"] for where, value in metrics.items())
            print(*key, f"{time.perf_counter() - start:.1f} s", flush=True)


# ---- summary


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the file's rows; none, if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


Values = dict[tuple[str, str], dict[str, float]]  # by seed and split: of each task
Runs = dict[str, Values]  # by learning rate


def best_lr(runs: Runs) -> str:
    """Pick the rate with the least validation error: geometric mean over tasks, mean over seeds."""

    def score(lr: str) -> float:
        logs = [math.log(v) for (_, split), tasks in runs[lr].items() if split == "validation" for v in tasks.values()]
        return math.inf if not all(map(math.isfinite, logs)) else float(np.mean(logs))

    return min(runs, key=score)


def relative(found: Values, reference: Values) -> list[float]:
    """Compute each seed's relative difference on the test rows, in percent, the mean over tasks."""
    return [
        float(np.mean([100 * (value / reference[key][task] - 1) for task, value in tasks.items()]))
        for key, tasks in found.items()
        if key[1] == "test" and key in reference
    ]


def summary(args: argparse.Namespace) -> None:
    """Print, for each data set and metric, each method's best rate, and its difference to the sum at its own best."""
    datasets: dict[tuple[str, str], dict[str, Runs]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(args.out):
        runs = datasets[row["dataset"], row["metric"]][f"{row['method']} {row['options']}".strip()]
        values = runs.setdefault(row["lr"], {}).setdefault((row["seed"], row["split"]), {})
        values[row["task"]] = float(row["value"])
    lines = []
    for (dataset, metric), methods in datasets.items():
        base = methods["sum"][best_lr(methods["sum"])]
        for method, runs in methods.items():
            lr = best_lr(runs)
            percents = relative(runs[lr], base)
            if percents:
                spread = float(np.std(percents, ddof=1)) if len(percents) > 1 else math.nan
                numbers = [f"{np.mean(percents):.1f}", f"{spread:.1f}", str(len(percents))]
                lines.append([dataset, metric, method, lr, *numbers])
    for line in lines:
        print(*line)
    if args.write:
        with open(args.write, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["dataset", "metric", "method", "lr", "percent_to_sum", "sd", "seeds"])
            writer.writerows(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="train, and append to the file what it does not have yet")
    command.add_argument("--dataset", choices=DATASETS, required=True)
    command.add_argument("--method", choices=METHODS, required=True)
    command.add_argument("--options", default="", help='BayesAgg\'s: "noise=estimated gamma=1 warmup=3"')
    command.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--data", type=Path, default=PACKAGED, help="folder of the data sets (default: the package's)")
    command.add_argument("--out", type=Path, default=Path("defaults.csv"))
    command.set_defaults(call=run)
    command = commands.add_parser("summary", help="print the table")
    command.add_argument("--out", type=Path, default=Path("defaults.csv"))
    command.add_argument("--write", type=Path, help="file for the table")
    command.set_defaults(call=summary)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
