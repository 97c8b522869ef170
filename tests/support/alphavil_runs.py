"""Runs of alphaVIL whose every random number counts, and all that they leave, for the tests of its state. As a script:
a run that writes a file after each stage."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.support.alphavil_cases import (
    ADAM,
    ALPHA,
    Case,
    epoch,
    hushed,
    random_state,
    same,
    same_random_state,
    seed_everything,
    set_random_state,
    values,
)

KINDS: dict[str, dict[str, Any]] = {
    "lists": {"subset": 0.5},
    "loaders": {"subset": 2},
    "generators": {"subset": 0.5},
    "everything": {"subset": 2, "make_optimizer": ADAM, "alpha_optimizer": ALPHA["adam"], "clip_alpha": (0.5, 1.5)},
    "lbfgs": {"alpha_optimizer": ALPHA["lbfgs"]},
    "momentum": {"alpha_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)},
    "bfloat16": {"delta_storage": "bfloat16", "include_heads": "none"},
    "host": {"delta_storage": "host", "include_heads": "all"},
    "pickled": {"subset": 2, "alpha_optimizer": ALPHA["adam"]},
}


class Run:
    """Dropout, BatchNorm, noise of torch, numpy and Python in the losses, data that is shuffled."""

    def __init__(self, kind: str, seed: int = 0, **options: Any):
        self.case = Case(norm=True, dropout=0.3, noise=0.1, seed=0, also=True)
        if kind in ("loaders", "everything", "generators", "pickled"):
            for i, (name, task) in enumerate(list(self.case.tasks.items())):
                generator = None if kind == "loaders" else torch.Generator().manual_seed(seed + i)
                rows: Any = task.train
                loader: Any = DataLoader(rows, batch_size=None, shuffle=True, generator=generator)
                self.case.change(name, train=loader)
            dev: Any = self.case.tasks["size"].dev
            generator = None if kind == "loaders" else torch.Generator().manual_seed(seed + 9)
            sampler = BatchSampler(RandomSampler(dev, generator=generator), 1, False)
            self.case.change("size", dev=DataLoader(dev, batch_sampler=sampler, collate_fn=first))
        self.vil = self.case.vil(**KINDS[kind], **options)
        if seed:  # as a process is that starts anew
            with torch.no_grad():
                for tensor in (*self.case.model.parameters(), *self.case.model.buffers()):
                    tensor.add_(1)
        seed_everything(seed)

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({"model": self.case.model.state_dict(), "vil": self.vil.state_dict()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.case.model.load_state_dict(state["model"])
        self.vil.load_state_dict(state["vil"])

    def fingerprint(self) -> dict[str, Any]:
        last, sources = self.vil.last, [s for task in self.case.tasks.values() for s in (task.train, task.dev)]
        batch_samplers = [getattr(source, "batch_sampler", None) for source in sources]
        generators = [
            getattr(s, "generator", None) for s in (*sources, *(getattr(b, "sampler", None) for b in batch_samplers))
        ]
        return {
            "values": values(self.case.model),
            "weights": self.vil.task_weights.clone(),
            "alphas": self.vil.alphas.clone(),
            "rounds": self.vil.rounds,
            "kept": None if last is None else last.kept,
            "losses": None if last is None else [last.before, last.start, last.after, *last.searched, *last.losses],
            "random": random_state(),
            "loaders": [g.get_state() for g in generators if g is not None],
        }

    @staticmethod
    def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
        plain = ("rounds", "kept", "losses")
        loaders = list(zip(first["loaders"], second["loaders"], strict=True))
        numbers = [each["random"] for each in (first, second)]
        return (
            all(first[name] == second[name] for name in plain)
            and same(first["values"], second["values"])
            and torch.equal(first["weights"], second["weights"])
            and torch.equal(first["alphas"], second["alphas"])
            and (numbers == [0, 0] or same_random_state(*numbers))
            and all(torch.equal(a, b) for a, b in loaders)
        )

    def same(self, other: dict[str, Any]) -> bool:
        return self.equal(self.fingerprint(), other)

    set_random_state = staticmethod(set_random_state)


def first(batches: list[Any]) -> Any:
    return batches[0]


def from_file(thing: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def finished(run: Run, rounds: int) -> None:
    while run.vil.rounds < rounds:
        epoch(run.vil)


def main(path: str, rounds: int, slow: Iterable[str]) -> None:
    torch.set_num_threads(1)
    run, number = Run("everything", seed=0), 0
    if os.path.exists(path):
        run.load(Path(path).read_bytes())
        number = int(Path(path + ".number").read_text())
    if slow:
        loss = run.case.tasks["kind"].loss
        object.__setattr__(run.vil._tasks["kind"], "loss", lambda *a: (time.sleep(0.02), loss(*a))[1])
    with hushed():
        while run.vil.rounds < rounds:
            for _ in run.vil.stages():
                number += 1
                for name, content in ((path, run.save()), (path + ".number", str(number).encode())):
                    Path(name + ".new").write_bytes(content)
                    os.replace(name + ".new", name)
                print(number, "stages", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
