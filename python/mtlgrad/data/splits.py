"""What the rows of a data set are for, where that is fixed."""

from __future__ import annotations

from torch import Tensor

SPLITS = ("train", "validation", "test")


def rows_of(split: Tensor, name: str) -> Tensor:
    """The row numbers of a split, ascending, int64; `split` [N] holds each row's index into SPLITS."""
    if name not in SPLITS:
        raise ValueError(f"rows: split must be one of {', '.join(SPLITS)}, found {name!r}")
    return (split == SPLITS.index(name)).nonzero().flatten()
