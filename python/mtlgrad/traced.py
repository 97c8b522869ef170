"""What an autograd function returns and saves under torch.compile: memory of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import define_operator

#: An operator, for compilers take ``clone`` away: of several clones of one intermediate inductor returns the original,
#: and a clone that the backward alone needs is made in the backward, of what the original holds by then.
copies = define_operator(
    "copies(Tensor[] tensors) -> Tensor[]",
    lambda tensors: [tensor.clone() for tensor in tensors],
    lambda tensors: list(map(torch.empty_like, tensors)),
)


def stand_ins(tensor: Tensor, count: int) -> list[Tensor]:
    """Return ``count`` tensors equal to the one given, for the ``forward`` of an autograd function to return.

    Eagerly they are views, which cost nothing. A compiled region must not return views: where two of its outputs share
    the memory of an intermediate, AOT autograd makes them again outside of the region, without the function's backward.
    """
    if torch.compiler.is_compiling():
        return copies([tensor] * count)
    return [tensor.view_as(tensor) for _ in range(count)]
