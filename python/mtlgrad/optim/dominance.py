"""Each task's share of what moved the parameters, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Layers = Iterable[Iterable[Tensor]] | Mapping[str, Iterable[Tensor]]


def layer_shares(layers: Layers, tasks: int, squares_of: Callable[[Tensor], Tensor | None]) -> Tensor:
    """[layers, T] float64 of the average squared updates [T] of the layers' parameters; None: it has none.

    Rows sum to one; those of layers without any are NaN. On the first device that is not the host, if there is one.
    """
    rows = []
    for layer in layers.values() if isinstance(layers, Mapping) else layers:
        found = [squares for p in layer if (squares := squares_of(p)) is not None]
        total = torch.zeros(tasks, dtype=torch.float64, device=found[0].device if found else None)
        for squares in found:
            total += squares.to(total.device)
        rows.append(total / total.sum())
    devices = [row.device for row in rows if row.device.type != "cpu"]
    return torch.stack([row.to(devices[0]) if devices else row for row in rows])
