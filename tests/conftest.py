"""Helpers that the tests of every operation share."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from types import ModuleType

import pytest
import torch
from simt.build import build


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small problems: they gain nothing from a second thread, and wait for it where it is busy elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
