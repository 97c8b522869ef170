"""CIFAR-MTL: CIFAR-100's twenty superclasses (Krizhevsky 2009) as twenty tasks, is it one of these or not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..recipes.backbones import resnet18
from ..recipes.recipe import MultiTaskNet, Recipe, Tensors, TrainError, linear_heads
from ..recipes.tasks import binary
from .files import data_folder, existing, split_off

SOURCE = "CIFAR-100's python version, unpacked (files train and test), from www.cs.toronto.edu/~kriz/cifar.html"
SUPERCLASSES = (
    *("aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices"),
    *("household furniture", "insects", "large carnivores", "large man-made outdoor things"),
    *("large natural outdoor scenes", "large omnivores and herbivores", "medium-sized mammals"),
    *("non-insect invertebrates", "people", "reptiles", "small mammals", "trees", "vehicles 1", "vehicles 2"),
)


class ArraysOnly(pickle.Unpickler):
    """Numbers, strings, lists, dicts and numpy's arrays: a data file has no other, and none that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0]}
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in arrays:
            return arrays[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Read a file of the archive: images [N, 3, 32, 32] uint8 and superclasses [N]."""
    existing(path, SOURCE)
    try:
        with path.open("rb") as file:
            content = ArraysOnly(file, encoding="bytes").load()
        pixels, labels = content[b"data"], np.asarray(content[b"coarse_labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"data of {pixels.dtype} {list(pixels.shape)} for {len(labels)} labels")
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or not np.isin(labels, range(20)).all():
            raise ValueError("coarse_labels that are not numbers from 0 to 19")
    except Exception as error:  # a damaged pickle can raise whatever it likes
        found = f"a file that cannot be used ({type(error).__name__}: {error})"
        raise TrainError(f"{path}: expected {SOURCE}, found {found}") from None
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


class Pixels(Tensors):
    """Images of bytes, which go from -1 to 1 as a batch is taken; targets: is it superclass 0, 1, ..., 19."""

    def __init__(self, images: Tensor, labels: Tensor):
        super().__init__(images, {name: (labels == i).float() for i, name in enumerate(SUPERCLASSES)})

    def __getitem__(self, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = super().__getitem__(rows)
        return images / 127.5 - 1.0, targets


class CIFARMTL(Recipe):
    """60,000 images in $MTLGRAD_DATA/cifar-100-python; the set's own test, 10 % of the others for validation.

    Tasks, pixels, batch size and epochs are those of the code published with BayesAgg-MTL (Achituve et al., arXiv
    2402.04005); the ResNet-18, in place of a net of three convolutions, and AUC, in place of accuracy, are ours.
    """

    name = "cifar-mtl"
    tasks = tuple(binary(name) for name in SUPERCLASSES)
    epochs = 50
    evaluation_batch_size = 512

    def __init__(self, seed: int):
        folder = data_folder("cifar-100-python", SOURCE)
        images, labels = read(folder / "train")
        rows = split_off(len(images), seed)
        self.train, self.validation = (Pixels(images[part], labels[part]) for part in rows)
        self.test = Pixels(*read(folder / "test"))

    def model(self) -> nn.Module:
        return MultiTaskNet(resnet18(), linear_heads(512, dict.fromkeys(SUPERCLASSES, 1)))
