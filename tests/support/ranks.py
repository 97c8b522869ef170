"""Several ranks on one machine: processes that stay, so that each test does not wait for imports; programs that are
forked, for the same reason; and data, models and parameters in the parts of the ranks.

``two_ranks(function, *arguments)`` and ``four_ranks(...)`` (fixtures in conftest.py) call ``function(*arguments)`` on
every rank of a gloo group and return the ranks' results. Functions are those of a module in ``tests/``, found by name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import re
import runpy
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import mtlgrad
from mtlgrad import BayesAgg
from mtlgrad.distributed import global_means
from mtlgrad.world.ranks import world_of
from mtlgrad.world.shards import like_sharded, local
from tests.support.bounds import assert_near, contents, hushed, normal, one_line
from tests.support.nets import (
    KINDS,
    LAYERS,
    Case,
    HeadData,
    Model,
    NamedBatch,
    Net,
    head_data,
    mean_loss,
    new,
    published_layer,
)

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


def forked(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """A process forked from one that has imported what takes seconds, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.support.oracles", "torch._dynamo"])
    process = context.Process(target=target, args=arguments, daemon=daemon)
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        process.start()
    finally:
        sys.path[:] = before
    return process


def _python(arguments: list[str], folder: str, said: str, environment: dict[str, str]) -> None:
    for to, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), to)
    os.chdir(folder)
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class Program:
    """``python ARGUMENTS``, :func:`forked`: of a script, or ``-m`` and a module."""

    def __init__(self, *arguments: str, folder: Path | None = None, environment: dict[str, str] | None = None):
        self._said = f"{tempfile.mkdtemp()}/said"
        self.process = forked(_python, list(arguments), str(folder or os.getcwd()), self._said, environment or {})

    def end(self, timeout: float = TIMEOUT) -> tuple[int | None, str, str]:
        """The exit code, stdout and stderr."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        out, err = (Path(f"{self._said}.{name}").read_text() for name in ("out", "err"))
        return self.process.exitcode, out, err


class Pool:
    """``size`` ranks of one group."""

    def __init__(self, size: int):
        self.size = size
        self._workers: list[tuple[BaseProcess, Connection]] = []

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
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.size):
            here, there = multiprocessing.Pipe()
            process = forked(_worker, rank, self.size, store, there, daemon=True)
            there.close()
            self._workers.append((process, here))

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Collectives that are called from Python (DDP's own are called from C++): the name, and the bytes that this rank
    gives."""
    found: list[tuple[str, int]] = []
    kinds = ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv", "batch_")

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            found.append((name, sum(v.numel() * v.element_size() for v in arguments if isinstance(v, Tensor))))
            return original(*arguments, **settings)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in list(vars(dist).items()):
            if name.startswith(kinds) and type(function) is FunctionType:
                patch.setattr(dist, name, wrap(name, function))
        yield found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives to a process, for tests that start (and kill) their own."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in own.items()}}


def by_rank(values: Any, counts: Sequence[int]) -> list[Any]:
    """Rows of a batch, cut into the ranks' parts."""
    found, start = [], 0
    for count in counts:
        found.append(values[start : start + count])
        start += count
    return found


def part_here(parts: Sequence[Any], join: Callable[[Any], Any]) -> Any:
    """This rank's part of a batch; one process has all of them, joined."""
    return parts[dist.get_rank()] if dist.is_initialized() else join(parts)


def of_all_ranks(rows: Any, group: Any = None) -> Tensor:
    """The gradient at a whole batch from those at the ranks' rows: of losses that are averaged over W ranks they are W
    times as large."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    every = [rows] * size
    if size > 1:
        dist.all_gather_object(every, rows, group)
    found: Tensor = torch.cat(every) / size
    return found


def agree(found: Sequence[dict[str, Any]], expected: dict[str, Any], bound: float = 1e-6, **bounds: float) -> None:
    """All ranks have the same bits, and of tensors what one process has within a bound, of anything else the same."""
    assert all(one.keys() == expected.keys() for one in found)
    for name, value in expected.items():
        if not isinstance(value, Tensor) and not (isinstance(value, list) and value and isinstance(value[0], Tensor)):
            assert all(one[name] == value for one in found), name
            continue
        tensors, *others = (list(one[name]) if isinstance(value, list) else [one[name]] for one in (expected, *found))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(other, others[0], strict=True)), f"{name}: ranks differ"
        for got, want in zip(others[0], tensors, strict=True):
            assert_near(got, want, bounds.get(name.split()[-1], bound))


def told(attempt: Callable[[], Any], kind: type[Exception], *parts: str) -> str:
    """What is said of an attempt, in one line."""
    with pytest.raises(kind) as error:
        attempt()
    one_line(error.value, *parts)
    return str(error.value)


def all_told(found: Sequence[list[str]], words: Sequence[str]) -> None:
    """All ranks were told the same, which begins with these words."""
    assert all(messages == found[0] for messages in found)
    for message, expected in zip(found[0], words, strict=True):
        assert re.match(expected, message), message


class Asked(NamedTuple):
    """What every rank does, and one process, and the bounds of :func:`agree`."""

    what: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    size: int = 2
    bounds: Mapping[str, float] = MappingProxyType({})

    @staticmethod
    def each(rows: Mapping[str, Asked]) -> pytest.MarkDecorator:
        """Parametrises with the names of rows; on four ranks, and compiled, they are slow."""
        slow = [pytest.mark.slow]
        named = [pytest.param(name, marks=slow * (row.size > 2 or "compile" in name)) for name, row in rows.items()]
        return pytest.mark.parametrize("row", named)

    def check(self, request: pytest.FixtureRequest) -> None:
        pool = request.getfixturevalue("two_ranks" if self.size == 2 else "four_ranks")
        agree(pool(self.what, *self.arguments), self.what(*self.arguments), **self.bounds)


# ---- three tasks with missing labels: the rules over the Gram matrix -------------------------------------------------

WIDTH, CLASSES = 12, 4


def own_draw(gram: Tensor) -> Tensor:
    """A weighting that differs from rank to rank, where it is asked."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return gram.diagonal().rsqrt() * (1 + rank)


RULES: dict[str, Callable[[], mtlgrad.GramRule]] = {
    "min": lambda: mtlgrad.AlignedMTL(3, [1.0, 2.0, 0.5]),
    "rmse": lambda: mtlgrad.AlignedMTL(3, [1.0, 2.0, 0.5], scale="rmse"),
    "upgrad": lambda: mtlgrad.UPGrad(3, [1.0, 2.0, 0.5]),
    "dualproj": lambda: mtlgrad.DualProj(3),
    "mgda": lambda: mtlgrad.MGDA(3),
    "cagrad": lambda: mtlgrad.CAGrad(3),
    "nash": lambda: mtlgrad.NashMTL(3),
    "fairgrad": lambda: mtlgrad.FairGrad(3),
    "imtlg": lambda: mtlgrad.IMTLG(3),
    "pcgrad": lambda: mtlgrad.PCGrad(3, seed=dist.get_rank() if dist.is_initialized() else 0),
    "of one's own": lambda: mtlgrad.GramRule(3, own_draw),
}


def shown(rule: mtlgrad.GramRule) -> dict[str, Tensor]:
    """What a rule tells of its latest use."""
    values = {"weights": rule.weights, "singular values": getattr(rule, "singular_values", None)}
    return {name: value for name, value in values.items() if value is not None}


class Labelled(NamedTuple):
    x: Tensor  # [B, 6]
    level: Tensor  # [B], NaN: no label
    kind: Tensor  # [B], -100: no label
    flags: Tensor  # [B, 2], NaN: no label


def labelled_net() -> Model:
    """A backbone with LayerNorm, and heads for a level, a kind and two flags."""
    return Model(with_layer_norm, heads=(1, CLASSES, 2), width=WIDTH)


def with_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, WIDTH), nn.Tanh())


def labelled_batches(count: int, rows: int, seed: int = 1) -> list[Labelled]:
    """Some labels are missing at random; the last batch is shorter."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        n = rows if i < count - 1 else max(rows - 3, 1)
        x = torch.randn(n, 6, generator=generator)
        level = torch.where(torch.rand(n, generator=generator) < 0.2, torch.nan, x[:, 0] + 0.3 * x[:, 1] ** 2)
        kind = torch.where(torch.rand(n, generator=generator) < 0.2, -100, (x[:, 1] > 0).long() + 2 * (x[:, 2] > 0))
        flags = torch.stack([(x[:, 3] > 0), (x[:, 4] + x[:, 5] > 0)], 1).float()
        flags[torch.rand(n, 2, generator=generator) < 0.2] = torch.nan
        found.append(Labelled(x, level, kind, flags))
    return found


def cut_batch(batch: Labelled, counts: list[int], absent: dict[int, int] | None = None) -> list[Labelled]:
    """The ranks' parts of a batch; `absent` says which task (0, 1, 2) has no label at all on which rank."""
    parts = [Labelled(*row) for row in zip(*(by_rank(column, counts) for column in batch))]
    for rank, task in (absent or {}).items():
        value = -100 if task == 1 else torch.nan
        columns = list(parts[rank])
        columns[task + 1] = torch.full_like(columns[task + 1], value)
        parts[rank] = Labelled(*columns)
    return parts


def joined_batch(parts: list[Labelled]) -> Labelled:
    return Labelled(*(torch.cat(column) for column in zip(*parts)))


def labelled_losses(net: Model, views: list[Tensor], batch: Labelled) -> list[Tensor]:
    """Means over the labelled examples of all ranks; a task without any here is an empty tensor of its head."""
    level = net.heads[0](views[0])[:, 0]
    kind = net.heads[1](views[1])
    flags = net.heads[2](views[2])
    has_level, has_kind, has_flags = ~batch.level.isnan(), batch.kind != -100, ~batch.flags.isnan()
    return global_means(
        [
            (level[has_level] - batch.level[has_level].to(level)) ** 2,
            F.cross_entropy(kind[has_kind], batch.kind[has_kind], reduction="none"),
            F.binary_cross_entropy_with_logits(flags[has_flags], batch.flags[has_flags].to(flags), reduction="none"),
        ]
    )


# ---- shards, with .jac as one process would have it: optimizers under fully_shard ------------------------------------

SHARDED_SHAPES = [(8, 3), (5, 2, 2), (1, 4), (3,)]  # shards of 2 and 4 ranks: even, uneven, empty
HEADS = [(5, 2), (1,)]


def narrow_net(seed: int = 0) -> Net:
    """A backbone of 1 and 3 rows, which four ranks do not all have."""
    backbone = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3), nn.Tanh())
    net = Net(seed=seed, backbone=backbone, width=3)
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.6, generator=generator)
    return net


def sharded_net(seed: int = 0) -> Net:
    net = narrow_net(seed)
    backbone: Any = net.backbone
    for layer in backbone:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    return net


def shards(parameters: Iterable[Tensor], hybrid: bool = False) -> list[Any]:
    """Over all ranks; hybrid: over two, with replicas on the others."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2) if hybrid else (size,))
    placements = [Replicate(), Shard(0)] if hybrid else [Shard(0)]
    return [nn.Parameter(shard(p.detach(), mesh, *placements)) for p in parameters]


def shard(tensor: Tensor, mesh: Any, *placements: Any) -> DTensor:
    return distribute_tensor(tensor, mesh, placements or [Shard(0)], src_data_rank=None)


def local_jac(whole: Tensor, p: Any) -> Tensor:
    """This rank's part of .jac of a parameter."""
    where = shard(torch.arange(p.numel()).view(p.shape), p.device_mesh, *p.placements)
    return whole.flatten(1)[:, local(where).flatten()].view(len(whole), *local(p).shape)


def unsharded(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def unsharded_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i} {key}": unsharded(v) for i, s in state.items() for key, v in s.items()}


def give_jac(parameters: Sequence[Any], seed: int, tasks: int = 3, absent: int | None = None) -> None:
    """.jac: all of it to ordinary parameters, this rank's part to shards."""
    for i, p in enumerate(parameters):
        jacobian = normal(1000 * seed + i, tasks, *p.shape) * 10.0 ** -torch.arange(tasks).view(-1, *[1] * p.dim())
        if absent is not None:
            jacobian[absent] = 0.0
        jacobian = jacobian.to(p.dtype)
        p.jac = like_sharded(local_jac(jacobian, p), p, tasks) if isinstance(p, DTensor) else jacobian


def give_grad(parameters: Sequence[Any], seed: int) -> None:
    for i, p in enumerate(parameters):
        gradient = normal(1000 * seed + 500 + i, *p.shape).to(p.dtype)
        p.grad = shard(gradient, p.device_mesh, *p.placements) if isinstance(p, DTensor) else gradient


def shared_and_heads(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Shared parameters and heads."""
    found = [new(i, *shape, dtype=dtype) for i, shape in enumerate((*SHARDED_SHAPES, *HEADS))]
    return found[: len(SHARDED_SHAPES)], found[len(SHARDED_SHAPES) :]


# ---- batches of alphaVIL ---------------------------------------------------------------------------------------------

#: How many rows of each batch a rank has: none, nearly as many as others, one.
TRAIN: dict[int, list[tuple[int, ...]]] = {
    2: [(16, 0), (9, 7), (15, 1)],
    4: [(7, 5, 4, 0), (5, 4, 4, 3), (13, 1, 1, 1)],
}
DEV: dict[int, list[tuple[int, ...]]] = {2: [(20, 12), (31, 1)], 4: [(8, 8, 8, 8), (20, 10, 1, 1)]}


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def unlabelled(batch: NamedBatch, rows: int) -> NamedBatch:
    """The first `rows` are without labels."""
    y = batch.y.clone()
    y[:rows] = -1 if y.dtype == torch.int64 else math.nan
    return batch._replace(y=y)


class Means:
    """A task's loss over the labelled rows of all ranks; a rank without any takes part all the same."""

    def __init__(self, task: str, process_group: Any = None):
        self.task, self.process_group = task, process_group

    def __call__(self, model: Any, batch: NamedBatch) -> Tensor:
        row = batch.y if batch.y.dim() == 1 else batch.y[:, 0]
        has = row >= 0 if row.dtype == torch.int64 else ~row.isnan()
        out, y = model.heads[self.task](model(batch.x)[has]), batch.y[has]
        if self.task == "size":
            each = F.mse_loss(out.squeeze(1), y, reduction="none")
        elif self.task == "kind":
            each = F.cross_entropy(out, y, reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        return global_means([each], process_group=self.process_group)[0]


def batches_of_rank(batches: Any, cuts: Iterable[tuple[int, ...]], rank: int) -> list[NamedBatch]:
    return [NamedBatch(b.number, by_rank(b.x, cut)[rank], by_rank(b.y, cut)[rank]) for b, cut in zip(batches, cuts)]


def parted_case(
    rank: int, size: int, seed: int = 0, *, disagree: bool = False, process_group: Any = None, **net: Any
) -> Case:
    """Three tasks; in batch 1, task "kind" has no labels on rank 0, nor the target in development batch 0 (2 ranks: its
    labels are those of rows 20 to 31). `disagree`: ranks but the first would have the target become worse."""
    case = Case(seed=seed, count=3, **net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        case.model.norm = nn.LayerNorm(8)
        nn.init.normal_(case.model.norm.weight, 1.0, 0.2)
    for name, task in list(case.tasks.items()):
        train: Any = list(task.train)
        if name == "kind":
            train[1] = unlabelled(train[1], 9)
        dev: Any = None if task.dev is None else list(task.dev)
        if dev is not None:
            dev[0] = unlabelled(dev[0], 20)
            if disagree:
                dev[1].y[20:] *= -0.3
        if size > 1:
            train = batches_of_rank(train, TRAIN[size], rank)
            dev = None if dev is None else batches_of_rank(dev, DEV[size], rank)
        case.change(name, train=train, dev=dev, loss=Means(name, process_group))
    return case


def two_rounds(case: Case, **options: Any) -> dict[str, Any]:
    vil, losses, said = case.vil(**options), [], []
    with hushed():
        for _ in range(2):
            losses += [stage.loss for stage in vil.stages()]
            assert vil.last is not None
            losses += [*vil.last.losses, *vil.last.searched, vil.last.before, vil.last.start, vil.last.after]
            said += [vil.last.kept, vil.last.sat_out]
    numbers = {"losses": torch.tensor(losses), "weights": vil.task_weights, "alphas": vil.alphas}
    return {**numbers, "moved": vil.alphas - 1, "said": said, **contents(case.model)}


# ---- batches of BayesAgg ---------------------------------------------------------------------------------------------

UNLABELLED = {"regression": math.nan, "binary": math.nan, "multiclass": -100}


def dataset(examples: int, width: int = WIDTH, missing: float = 0.1) -> list[HeadData]:
    data = [head_data(kind, examples, width, seed=i, missing=missing) for i, kind in enumerate(KINDS)]
    for other in data[1:]:
        other.features = data[0].features
    return [d.to(torch.float32) for d in data]


def parts_of(
    data: Sequence[HeadData], at: int, counts: Sequence[int], without: dict[int, list[str]]
) -> list[list[HeadData]]:
    """The ranks' parts of the batch that starts at an example."""
    whole = [d.rows(slice(at, at + sum(counts))) for d in data]
    parts = []
    for rank, rows in enumerate(by_rank(range(sum(counts)), counts)):
        part = [d.rows(list(rows)) for d in whole]
        for d in part:
            if d.kind in without.get(rank, []):
                d.targets = torch.full_like(d.targets, UNLABELLED[d.kind])
        parts.append(part)
    return parts


def joined(parts: Sequence[Sequence[HeadData]]) -> list[HeadData]:
    return [
        HeadData(
            same[0].kind, torch.cat([d.features for d in same]), torch.cat([d.targets for d in same]), same[0].weight
        )
        for same in zip(*parts)
    ]


def layers(data: Sequence[HeadData], **options: Any) -> tuple[list[nn.Linear], BayesAgg]:
    heads = []
    for d in data:
        head = nn.Linear(d.features.shape[1], len(d.weight), dtype=d.features.dtype)
        with torch.no_grad():
            rows = d.weight.to(d.features)
            head.weight.copy_(rows[:, : d.features.shape[1]])
            head.bias.fill_(0.3)
        heads.append(head)
    return heads, published_layer([LAYERS[d.kind](head, gamma=0.3) for d, head in zip(data, heads)], **options)


#: What a rank has of a batch: examples, by rank; kinds without any label there. None is a refresh.
Plan = Sequence["tuple[list[int], dict[int, list[str]]] | None"]


class Layered(Model):
    """A backbone, a head of each kind, and the layer between."""

    def __init__(self, data: Sequence[HeadData], noise: float | str = 1.0, bias: bool = False, **options: Any):
        width = data[0].features.shape[1]
        super().__init__(
            lambda: nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width)),
            heads=[len(d.weight) for d in data],
            width=width,
        )
        powers = {"regression": 0.5, "binary": 1.0, "multiclass": 0.7}
        more: dict[str, dict[str, Any]] = {"regression": {"noise": noise, "bias": bias}}
        wrapped = [
            LAYERS[d.kind](head, gamma=0.3, power=powers[d.kind], **more.get(d.kind, {}))
            for d, head in zip(data, self.heads)
        ]
        self.layer = published_layer(wrapped, **options)

    def forward(self, inputs: Tensor, data: list[HeadData]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        """The features, and the losses of each head's labelled examples."""
        features = self.backbone(inputs)
        if features.requires_grad:
            features.retain_grad()
        out = self.layer(features, [d.targets for d in data])
        found = []
        for d, head in zip(data, self.heads):
            z, y = head(out)[d.labelled], d.targets[d.labelled]
            if d.kind == "multiclass":
                found.append(F.cross_entropy(z, y, reduction="none"))
            elif d.kind == "binary":
                found.append(F.binary_cross_entropy_with_logits(z, y, reduction="none"))
            else:
                found.append((z - y).square())
        return features, found


def trained_layer(
    plan: Plan, options: dict[str, Any], wrap: Callable[[Any], Any] | None = None, width: int = WIDTH
) -> dict[str, Any]:
    """What a training through the plan leaves, on ranks (`wrap`: in DDP, or what shards the model) or one process."""
    data = dataset(sum(sum(step[0]) for step in plan if step), width)
    net: Any = Layered(data, **options)
    layer = net.layer
    if dist.is_initialized() and wrap is not None:
        net = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    gradients, at = [], 0
    for step in plan:
        if step is None:
            layer.refresh()
            continue
        batch = part_here(parts_of(data, at, *step), joined)
        at += sum(step[0])
        optimizer.zero_grad()
        features, values = net(batch[0].features, batch)
        (layer.total(global_means(values)) * 0.5).backward()
        optimizer.step()
        gradients.append(of_all_ranks(features.grad))
    assert [z.shape[1] for z in layer.predict(batch[0].features)] == [3, 3, 3]
    return {"features": gradients, "parameters": [unsharded(p) for p in net.parameters()], **laws(layer)}


def laws(layer: BayesAgg) -> dict[str, list[Tensor]]:
    """The means and covariances of the full-data posteriors."""
    found = list(layer.posteriors or ())
    matrices = [m if isinstance(m, tuple) else (m,) for m in (p.covariance() for p in found)]
    return {"means": [p.mean for p in found], "covariances": [matrix for m in matrices for matrix in m]}


def see(layer: BayesAgg, batch: Sequence[HeadData], dtype: torch.dtype | None = None) -> Tensor:
    features = batch[0].features.to(dtype).clone().requires_grad_()
    out = layer(features, [d.targets for d in batch])
    world = world_of(layer._group)
    share = len(features) * world.size / float(world.sum_(torch.tensor([float(len(features))])))
    losses = []
    for d, head in zip(batch, layer.heads):
        linear = head.layers[0]
        assert isinstance(linear, nn.Linear)
        losses.append(share * mean_loss(d, linear(out.to(linear.weight))))
    layer.total(losses).backward()
    assert features.grad is not None
    return features.grad


def see_quietly(layer: BayesAgg, batch: Sequence[HeadData]) -> None:
    """A pass for the full-data posterior alone, as in the warm-up."""
    known, layer._posteriors = layer._posteriors, None
    layer(batch[0].features.clone().requires_grad_(), [d.targets for d in batch])
    layer._posteriors = known
