"""What a recipe is: tasks, data and a model. One file a data set; yours is one, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from .tasks import Task


class TrainError(Exception):
    """Something the user can put right; its text is the one line that the command line prints."""

    def __init__(self, words: str = ""):
        super().__init__(words.rpartition("TrainError: ")[2])  # a DataLoader's worker hands on its traceback


class Recipe:
    """The base of every recipe: derive from it, and set in ``__init__(seed)`` what stands below without a value.

    A data set's item is ``(inputs, targets)``: inputs are what the backbone takes (a tensor; a tuple or a dict, given
    to it as its arguments), targets a dict from the tasks' names to a tensor or a number.

    Args:
        seed: may draw the split. All methods of a seed get one recipe.
    """

    name: ClassVar[str] = ""
    epochs: ClassVar[int] = 10
    batch_size: ClassVar[int] = 128
    evaluation_batch_size: ClassVar[int] = 4096  #: as much as memory allows; of alphaVIL's development batches, too
    workers: ClassVar[int] = 0  #: processes of the DataLoader

    tasks: Sequence[Task]
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]

    def __init__(self, seed: int):
        """Read the data."""

    def model(self) -> nn.Module:
        """Return a fresh model that has ``backbone`` and ``heads``, as :class:`MultiTaskNet` has."""
        raise NotImplementedError

    def loader(self, data: Dataset[Any], sampler: Sampler[int], batch_size: int) -> DataLoader[Any]:
        """Make the loader of a split; override it for another ``collate_fn``.

        Args:
            data: the split.
            sampler: of its rows.
            batch_size: the most that a batch has.

        Returns:
            The loader, of ``(inputs, targets)``.
        """
        if getattr(data, "takes_lists", False):
            return DataLoader(data, sampler=BatchSampler(sampler, batch_size, drop_last=False), batch_size=None)
        return DataLoader(
            data,
            batch_size,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the workers' seeds; set for each epoch
        )


class MultiTaskNet(nn.Module):
    """A backbone to features, and a head a task.

    Args:
        backbone: from inputs to features.
        heads: by the tasks' names.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)


def linear_heads(width: int, outputs: Mapping[str, int]) -> dict[str, nn.Module]:
    """Make a linear layer a task.

    Args:
        width: of the features.
        outputs: task -> number of outputs.

    Returns:
        Task -> layer.
    """
    return {name: nn.Linear(width, count) for name, count in outputs.items()}


class Tensors(Dataset[Any]):
    """Rows of tensors in memory, of which a batch is one indexing.

    Args:
        inputs: [N, ...].
        targets: task -> [N, ...].

    Raises:
        TrainError: what is no tensor, or has not N rows.
    """

    takes_lists = True

    def __init__(self, inputs: Tensor, targets: Mapping[str, Tensor]):
        for name, values in {"inputs": inputs, **targets}.items():
            if not isinstance(values, Tensor) or len(values) != len(inputs):
                found = f"{len(values)} rows" if isinstance(values, Tensor) else type(values).__name__
                raise TrainError(f"Tensors: {name}: expected a tensor of {len(inputs)} rows, found {found}")
        self.inputs, self.targets = inputs, dict(targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.as_tensor(rows)
        return self.inputs[rows], {name: values[rows] for name, values in self.targets.items()}

    def only(self, rows: Tensor) -> Tensors:
        """Choose rows, as a split.

        Args:
            rows: their numbers.

        Returns:
            A copy of them.
        """
        return Tensors(self.inputs[rows], {name: values[rows] for name, values in self.targets.items()})


def random_split(count: int, train: float, validation: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the rows for training, validation and test.

    Args:
        count: of all rows.
        train, validation: their parts of one; the others are for the test.
        seed: of the draw.

    Returns:
        The rows of each, int64.
    """
    # Another stream than those of the training rows' order.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2_000_000_000 + seed))
    first = int(count * train + 1e-6)
    return order.tensor_split([first, first + int(count * validation + 1e-6)])  # type: ignore[return-value]


def standardised(values: Tensor, train: Tensor) -> Tensor:
    """Scale inputs to mean 0 and deviation 1 over the training rows; NaN becomes 0, the mean there.

    A column that is constant in the training rows is only shifted.

    Args:
        values: [N, F].
        train: the training rows.

    Returns:
        [N, F] float32.
    """
    mean = values[train].nanmean(0).nan_to_num()
    filled = torch.where(values.isnan(), mean, values)
    deviation = filled[train].std(0)
    return ((filled - mean) / torch.where(deviation > 0, deviation, 1.0)).float()


def standardised_labels(values: Tensor, train: Tensor) -> tuple[Tensor, float]:
    """Scale a regression's labels to mean 0 and deviation 1 over the training rows; NaN, no label, stays NaN.

    Args:
        values: [N].
        train: the training rows.

    Returns:
        [N] float32, and the deviation that there was.

    Raises:
        TrainError: the training rows' labels are all the same, or fewer than two.
    """
    known = values[train][~values[train].isnan()].double()
    if len(known) < 2 or not float(known.std()):
        raise TrainError(f"expected labels that differ in the training rows, found {len(known)} labels, all the same")
    scale = float(known.std())
    return ((values.double() - known.mean()) / scale).float(), scale
