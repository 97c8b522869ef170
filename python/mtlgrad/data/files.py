"""Data sets that users put on disk: found in a folder, read and checked, never written to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..recipes.recipe import TrainError, random_split

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(4, CORES)  #: processes that read: DataLoader warns of more than there are cores


def data_folder(name: str, source: str) -> Path:
    """Return ``name`` in the folder that the environment variable MTLGRAD_DATA names (``data`` where it is not set)."""
    return existing(Path(os.environ.get("MTLGRAD_DATA") or "data", name), source, folder=True)


def existing(path: Path, source: str, folder: bool = False) -> Path:
    """Return the path of a file or folder; where there is none, ``source`` says what it is and who has it."""
    if not (path.is_dir() if folder else path.is_file()):
        raise TrainError(f"{path}: expected {source}, found none; MTLGRAD_DATA names the folder of all data sets")
    return path


def split_off(count: int, seed: int, part: float = 0.1) -> tuple[Tensor, Tensor]:
    """Draw a part, rows for validation, of a training set: what is left, and the part."""
    rows, _, held_out = random_split(count, 1.0 - part, 0.0, seed)
    return rows, held_out


def read_image(path: Path, size: int) -> Tensor:
    """Read an image of any format as RGB, resized to a square: [3, size, size] from -1 to 1."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise TrainError(f"{path}: expected the package pillow, found none; pip install 'mtlgrad[data]'") from None
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # of a dozen types, by format and damage
        raise TrainError(f"{path}: expected an image, found a file that cannot be read: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1.0


def read_array(path: Path, shape: Sequence[int]) -> Tensor:
    """Read a .npy file of finite numbers of a shape, as float32."""
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # OSError, EOFError, ValueError, and what a damaged header raises
        raise TrainError(f"{path}: expected an array, found a file that cannot be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.shape != tuple(shape):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise TrainError(f"{path}: expected numbers {list(shape)}, found {found}")
    if not np.isfinite(array).all():
        raise TrainError(f"{path}: expected finite numbers, found NaN or infinity")
    return torch.from_numpy(array.astype(np.float32))


class ImageFiles(Dataset[Any]):
    """Image files [N] and, a task, targets [N]; ``mirrored``: every other image, by chance, for training."""

    def __init__(self, paths: Sequence[Path], targets: Mapping[str, Tensor], size: int, mirrored: bool = False):
        self.paths, self.targets, self.size, self.mirrored = paths, dict(targets), size, mirrored

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = read_image(self.paths[index], self.size)
        if self.mirrored and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, {name: values[index] for name, values in self.targets.items()}
