"""NYUv2 (Silberman et al., ECCV 2012): a room -> a class, the depth and the surface normal at each pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from ..recipes.backbones import resnet18
from ..recipes.recipe import MultiTaskNet, Recipe, TrainError
from ..recipes.tasks import MAE, Mean, MeanIoU, Task, absolute_error, multiclass
from .files import WORKERS, data_folder, existing, read_array, split_off


class Scenes(Dataset[Any]):
    """Files image/N.npy, label/N.npy, depth/N.npy and perhaps normal/N.npy in a folder; a label of -1, a depth or a
    normal of 0 is missing. Items are channels first.
    """

    def __init__(self, folder: Path, recipe: type[DenseScenes]):
        self.folder, self.recipe = folder, recipe
        kinds = [existing(folder / kind, recipe.source, folder=True) for kind in recipe.channels]
        self.names = sorted({path.name for kind in kinds for path in kind.glob("*.npy")}, key=lambda n: (len(n), n))
        for path in (kind / name for kind in kinds for name in self.names):
            if not path.is_file():
                raise TrainError(f"{path}: expected an array beside the others of this number, found none")
        if len(self.names) < 2:
            raise TrainError(f"{folder}: expected {recipe.source}, found {len(self.names)} scenes")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        paths = {kind: self.folder / kind / self.names[index] for kind in self.recipe.channels}
        image, label, *others = (
            read_array(paths[kind], (*self.recipe.size, *channels)) for kind, channels in self.recipe.channels.items()
        )
        classes, last = label.long(), self.recipe.classes - 1
        if (classes != label).any() or classes.min() < -1 or classes.max() > last:
            raise TrainError(f"{paths['label']}: expected classes from 0 to {last}, or -1, found others")
        targets = {"segmentation": classes.masked_fill(classes == -1, -100)}
        for kind, values in zip(list(paths)[2:], others, strict=True):
            targets[kind] = values.masked_fill((values == 0.0).all(-1, keepdim=True), math.nan).movedim(-1, 0)
        return image.movedim(-1, 0), targets


class DenseScenes(Recipe):
    """Scenes in train/ and val/ of a folder; val/ is the test, 10 % of train/ for validation. Derive a set from it.

    A ResNet-18 to 1/32 of the size and, a task, two convolutions of 3 x 3; nothing is pretrained or dilated: ours.
    """

    channels: ClassVar[Mapping[str, tuple[int, ...]]] = {"image": (3,), "label": (), "depth": (1,)}
    size: ClassVar[tuple[int, int]]
    classes: ClassVar[int]
    source: ClassVar[str]
    epochs = 200
    evaluation_batch_size = 8
    workers = WORKERS

    def __init__(self, seed: int):
        folder = data_folder(self.name, self.source)
        scenes = Scenes(folder / "train", type(self))
        self.train, self.validation = (Subset(scenes, rows.tolist()) for rows in split_off(len(scenes), seed))
        self.test = Scenes(folder / "val", type(self))

    def model(self) -> nn.Module:
        outputs = {"segmentation": self.classes, "depth": 1, "normal": 3}
        heads = {task.name: decoder(outputs[task.name], self.size) for task in self.tasks}
        return MultiTaskNet(resnet18()[:-2], heads)  # without the mean over the places


def decoder(outputs: int, size: tuple[int, int]) -> nn.Module:
    """Make a head: features [B, 512, H / 32, W / 32] -> [B, outputs, H, W]."""
    return nn.Sequential(
        nn.Conv2d(512, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Upsample(scale_factor=4, mode="bilinear"),
        nn.Conv2d(128, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, outputs, 1), nn.Upsample(size, mode="bilinear"),
    )  # fmt: skip


def one_minus_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over the pixels that have a normal; outputs of any length."""
    cosine = functional.cosine_similarity(output, target.nan_to_num(), dim=1)
    missing = target.isnan().any(1)
    return (1.0 - cosine).masked_fill(missing, 0.0).sum() / (~missing).sum().clamp_min(1)


class Angle(Mean):
    """Mean angle between outputs and targets, in degrees."""

    name = "angle"

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        cosine = functional.cosine_similarity(output.double(), target.double(), dim=1)
        return cosine.clamp(-1.0, 1.0).acos().rad2deg()


class NYUv2(DenseScenes):
    """795 scenes to train on and 654 for the test, of 288 x 384, in $MTLGRAD_DATA/nyuv2; 13 classes, metres.

    As preprocessed for MTAN (Liu et al., CVPR 2019). Batch size, epochs and losses are those of LibMTL's example;
    of its metrics this has one a task.
    """

    name = "nyuv2"
    source = (
        "NYUv2 as preprocessed for MTAN (train/ and val/, each with image/, label/, depth/ and normal/ of N.npy), "
        "from github.com/lorenmt/mtan"
    )
    channels: ClassVar[Mapping[str, tuple[int, ...]]] = {**DenseScenes.channels, "normal": (3,)}
    size, classes, batch_size = (288, 384), 13, 8
    tasks = (
        multiclass("segmentation", MeanIoU),
        Task("depth", absolute_error, MAE, unit="m"),
        Task("normal", one_minus_cosine, Angle, unit="°", digits=2),
    )
