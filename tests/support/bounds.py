"""Numbers that are the same in every run, the types' roundings, and comparisons."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-149, torch.float64: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def normal(seed: int, *shape: int) -> Tensor:
    """float64, but the numbers are float32's: rounding them further is what a test has to ask for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- one tensor and another ------------------------------------------------------------------------------------------


def near(got: Tensor, want: Tensor, tolerance: float, least: float = 0.0) -> bool:
    """Every element within `tolerance` of the largest, or of `least` where all are smaller."""
    assert got.shape == want.shape
    if not got.numel():
        return True
    size = max(float(want.double().abs().max()), least)
    return bool(((got.cpu().double() - want.cpu().double()).abs() <= tolerance * size).all())


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-6) -> None:
    """Of one shape and type, and every element within `tolerance` of the largest."""
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    error = (got.double() - want.double()).abs().max() if got.numel() else 0.0
    assert near(got, want, tolerance), f"error {float(error):.3g}"


def all_near(got: Iterable[Tensor | None], want: Iterable[Tensor | None], tolerance: float = 1e-5) -> None:
    """None where the other is."""
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert near(a, b, tolerance, 1e-7)


def same(first: Mapping[str, Tensor] | Iterable[Tensor], second: Mapping[str, Tensor] | Iterable[Tensor]) -> bool:
    """Bit for bit, with types, shapes and names."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and same(first.values(), [second[name] for name in first])
    assert not isinstance(first, Mapping)
    assert not isinstance(second, Mapping)
    pairs = list(zip(first, second, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def same_values(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit; NaN is NaN."""
    pairs = [(a, second[name]) for name, a in first.items()]
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


def alike(first: Any, second: Any) -> bool:
    """Bit for bit, with types, whatever is nested in what; NaN is NaN."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and same_values({"": first}, {"": second})
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(alike(value, second[name]) for name, value in first.items())
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(alike, first, second))
    return bool(first == second or (first != first and second != second))


# ---- copies ----------------------------------------------------------------------------------------------------------


def values(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def gradients(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    """Copies of .grad."""
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def flat(tensors: Iterable[Tensor], tasks: int | None = None) -> Tensor:
    """One float64 vector, or [T, N] of tensors [T, *shape]."""
    if tasks is None:
        return torch.cat([t.detach().double().reshape(-1) for t in tensors])
    return torch.cat([t.detach().double().reshape(tasks, -1) for t in tensors], 1)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies, by parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{i} {name}": v.clone() for i, s in state.items() for name, v in s.items() if isinstance(v, Tensor)}


# ---- random numbers --------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def random_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return [torch.get_rng_state(), (str(name), np.asarray(keys).tolist(), *rest), random.getstate()]


def set_random_state(state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


def same_random_state(first: list[Any], second: list[Any]) -> bool:
    return torch.equal(first[0], second[0]) and first[1:] == second[1:]


# ---- messages --------------------------------------------------------------------------------------------------------


def one_line(error: BaseException, *parts: str) -> None:
    """A message is one line, and names all of this."""
    message = str(error)
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


@contextmanager
def hushed() -> Iterator[None]:
    """What a round says of itself is not at issue."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AlphaVIL: ", RuntimeWarning)
        yield
