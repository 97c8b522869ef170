"""Helpers that the tests of every operation share."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from mtlgrad.ops import _native
from tests.simt.build import build

if TYPE_CHECKING:
    from tests.support.ranks import Pool

HAS_GPU = torch.cuda.is_available() and _native.KERNELS["cuda"] is not None


@functools.cache
def emulated_extension() -> ModuleType:
    """``_C`` with its CUDA kernels run on the host: the ``*_cuda`` functions take CPU pointers, stream 0 and device 0.

    Built on the first call. A build that fails is an error, never a skip: the CUDA sources would go untested.
    """
    path = build("_C")
    loader = ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(
    params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no usable GPU"))]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to put tensors, with the kernels of the backend behind the operations."""
    if request.param == "emulated":
        monkeypatch.setitem(_native.KERNELS, "cpu", emulated_extension().cuda)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small problems: they gain nothing from a second thread, and wait for it where it is busy elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _pool(size: int) -> Iterator[Pool]:
    from tests.support.ranks import Pool  # with all of torch.distributed, which most tests do without

    pool = Pool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Pool]:
    """For tests that are slow: two ranks do for the others."""
    yield from _pool(4)


@pytest.fixture(params=["two_ranks", pytest.param("four_ranks", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> Pool:
    pool: Pool = request.getfixturevalue(request.param)
    return pool
