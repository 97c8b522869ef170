"""Several ranks on one machine: processes that stay, so that each test does not wait for imports.

``two_ranks(function, *arguments)`` and ``four_ranks(...)`` (fixtures in conftest.py) call ``function(*arguments)`` on
every rank of a gloo group and return the ranks' results. Functions are those of a module in ``tests/``, found by name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 120.0  # seconds for a call, on a busy machine


class RankError(Exception):
    """What a rank raised, as text."""


def _worker(rank: int, size: int, store: str, connection: Connection) -> None:
    # pytest's own filters do not reach a new process.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="Guards may run slower on Python 3.13.0", category=RuntimeWarning)
    # torch.compile looks at everything, and makes objects that nobody should.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    while True:
        try:
            module, name, arguments = _read(connection)
        except EOFError:
            return
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(_bytes(answer))


def _bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _read(connection: Connection) -> Any:
    return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)


class Pool:
    """``size`` ranks of one group."""

    def __init__(self, size: int):
        self.size = size
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send_bytes(_bytes((function.__module__, function.__qualname__, arguments)))
        answers = []
        for rank, (_, connection) in enumerate(self._workers):
            if not connection.poll(TIMEOUT):
                self.close()
                raise RankError(f"rank {rank} of {self.size} did not answer within {TIMEOUT} s")
            try:
                answers.append(_read(connection))
            except EOFError:
                self.close()
                raise RankError(f"rank {rank} of {self.size} died") from None
        failed = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if failed:
            self.close()  # the ranks may no longer be in step
            raise RankError("\n".join(failed))
        return [answer for _, answer in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        store = str(Path(folder) / "store")
        before = list(sys.path)
        sys.path.insert(0, str(Path(__file__).parents[2]))
        try:
            for rank in range(self.size):
                here, there = context.Pipe()
                process = context.Process(target=_worker, args=(rank, self.size, store, there), daemon=True)
                process.start()
                there.close()
                self._workers.append((process, here))
        finally:
            sys.path[:] = before

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank gives to collectives called from Python, by collective (DDP's own are called from C++)."""
    found: dict[str, int] = {}

    def wrap(name: str, position: int) -> Callable[..., Any]:
        original = getattr(torch.distributed, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            given = arguments[position]
            found[name] = found.get(name, 0) + given.numel() * given.element_size()
            return original(*arguments, **settings)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, position in (("all_reduce", 0), ("all_gather", 1), ("broadcast", 0)):
            patch.setattr(torch.distributed, name, wrap(name, position))
        yield found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives to a process, for tests that start (and kill) their own."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in own.items()}}


def by_rank(values: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """Rows of a batch, cut into the ranks' parts."""
    found, start = [], 0
    for count in counts:
        found.append(values[start : start + count])
        start += count
    return found
