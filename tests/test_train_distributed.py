"""``torchrun -m mtlgrad train``: several processes come to what one does, and one that dies stops all, harmlessly."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import counted, environment, free_port
from torch import nn

from mtlgrad.cli import _parser, _settings, main
from mtlgrad.recipes.base import Job, Settings, Task, TrainError
from mtlgrad.recipes.comparison import Comparison, Stop, Watchers
from mtlgrad.recipes.optimizers import ADATASK
from mtlgrad.recipes.parts import Recipe, Rows, Split, Table
from mtlgrad.recipes.rounds import training
from mtlgrad.recipes.team import any_rank, slices
from mtlgrad.recipes.weighting import METHODS, SUMS
from mtlgrad.world.ranks import ALONE, World

GPUS = torch.cuda.device_count()
#: Every batch of eight, the last of one row: with two ranks, one of them has none of it.
ROWS, SIZE = 41, 8


class Small(Recipe):
    """Three kinds of tasks on a net in float64, without dropout: what differs is more than rounding."""

    name = "small"
    width = 4
    epochs = 2
    tasks = (
        Task("a", "regression", 1, "RMSE", False),
        Task("b", "binary", 1, "AUC", True),
        Task("c", "multiclass", 3, "accuracy", True),
    )

    def split(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(ROWS + 20, 6, generator=generator, dtype=torch.float64)
        noise = torch.randn(ROWS + 20, 3, generator=generator, dtype=torch.float64)
        z = x[:, :3] + 0.5 * x[:, 3:] + noise
        labels = [3 * z[:, 0], (z[:, 1] > 0).double(), (z[:, 2] > -0.5).long() + (z[:, 2] > 0.5).long()]
        order = torch.arange(ROWS + 20)
        rows = Rows(order[:ROWS], order[ROWS : ROWS + 10], order[ROWS + 10 :])
        return Split(seed, rows, self.tasks, labels, lambda chosen: Table(x[chosen]), self.device)

    def backbone(self):
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def layers(self, backbone):
        return {"first": [*backbone[0].parameters()], "last": [*backbone[2].parameters()]}

    def net(self, tasks):
        return super().net(tasks).double()


def train(method, optimizer="adam", task=None):
    """Two epochs: the net, what history says, what predictions say."""
    torch.manual_seed(7)  # what is left over from other tests
    settings = Settings(
        methods=(method,), epochs=2, warmup=1, batch_size=SIZE, target="a", subset=0.5, covariance="full", lr=0.01
    )
    trainer = training(Small(torch.device("cpu")), Job(method, 1, task, optimizer), settings)
    ticks = []
    for _ in range(2):
        trainer.run_epoch(lambda epoch, step, losses: ticks.append((epoch, step)))
    result = trainer.finish()
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in result.history]
    rounds = [(r["alphas"], r["weights"], r["before"], r["after"]) for r in result.rounds]
    net = torch.cat([p.detach().flatten() for p in trainer.net.parameters()])
    return net, history, rounds, result.metrics, result.losses, result.condition, result.variance, ticks


def assert_close(a, b, tolerance):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert a == b


METHOD_CASES = [
    *((method, "adam", None) for method in (*METHODS, "alphavil", "diw")),
    *((SUMS[1], optimizer, None) for optimizer in ADATASK),
    ("sum", "adam", 2),
]


@pytest.mark.parametrize(("method", "optimizer", "task"), METHOD_CASES)
def test_ranks_come_to_what_one_process_does(two_ranks, method, optimizer, task):
    alone = train(method, optimizer, task)
    first, second = two_ranks(train, method, optimizer, task)
    assert torch.equal(first[0], second[0])  # nothing that would drift apart
    for found in (first, second):
        assert_close(found[0], alone[0], 1e-9)
        assert_close(found[1:], alone[1:], 1e-6)  # weights are shown in float32


@pytest.mark.parametrize("method", ["logsum", "bayesagg"])
def test_four_ranks_too_most_of_them_without_a_row_of_the_last_batch(four_ranks, method):
    alone = train(method)
    for found in four_ranks(train, method):
        assert_close(found[0], alone[0], 1e-9)
        assert_close(found[1:], alone[1:], 1e-6)


# ---- processes

SETTINGS = ["--method", "uncertainty", "--seeds", "1", "--epochs", "2", "--batch-size", "512"]


def run_whole(out):
    given = vars(_parser().parse_args(["train", *SETTINGS]))
    del given["command"]
    settings = _settings(given)
    assert Comparison.start(settings, out, "whole").run(Watchers(), Stop())


def begin(folder, *arguments, size=2):
    """What torchrun starts, in `folder`."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mtlgrad", "train", *arguments],
            cwd=folder,
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes):
    """(exit code, stdout, stderr) of each."""
    texts = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def wait_for_epoch(path, processes, after=0):
    """Until a checkpoint was written in the middle of a training, later than that of time `after`; its time."""
    give_up = time.monotonic() + 120
    while True:
        found = path.stat() if path.exists() else None
        if found and found.st_size > 100_000 and found.st_mtime_ns > after:
            return found.st_mtime_ns
        assert all(process.poll() is None for process in processes), ends(processes)
        assert time.monotonic() < give_up
        time.sleep(0.01)


def tables(path):
    """What must repeat; seconds left out."""
    history = [line.rsplit(",", 1)[0] for line in (path / "history.csv").read_text().splitlines()]
    model = torch.load(path / "model-uncertainty-0.pt", weights_only=True)
    return (path / "results.csv").read_text(), (path / "dominance.csv").read_text(), history, model


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


def test_a_killed_rank_stops_all_and_the_run_goes_on_as_if_nothing_had_been(two_ranks, tmp_path):
    path = tmp_path / "runs" / "hurt"
    processes = begin(tmp_path, *SETTINGS, "--name", "hurt")
    saved = wait_for_epoch(path / "checkpoint.pt", processes)
    processes[1].kill()
    (code, _, err), (killed, *_) = ends(processes)
    assert killed == -signal.SIGKILL
    assert code == 2
    assert err.startswith("mtlgrad train: rating alone, seed 0: lost another process, or it did not answer within")
    assert err.endswith("what was done is saved: --resume runs/hurt\n")
    assert err.count("\n") == 1
    assert os.listdir(path) == ["checkpoint.pt"]  # nothing half-written

    # Goes on where it was; this time one rank is asked to stop.
    processes = begin(tmp_path, "--resume", "runs/hurt")
    wait_for_epoch(path / "checkpoint.pt", processes, saved)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), other = ends(processes)
    assert (code, err) == (130, "")
    assert "stopped; what was done is saved: mtlgrad train --resume runs/hurt" in out
    assert other == (130, "", "")

    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    rest = subprocess.run(
        [sys.executable, *launch, "-m", "mtlgrad", "train", "--resume", "runs/hurt"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (rest.returncode, rest.stderr) == (0, "")
    assert rest.stdout.count("run folder runs/hurt") == 1

    two_ranks(run_whole, tmp_path / "runs")
    for a, b in zip(tables(path), tables(tmp_path / "runs" / "whole"), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number from 1"),
        (["--device", "cuda:1"], "argument --device: expected cpu or cuda, since each of 2 processes takes the GPU of"),
        (
            ["--device", "cuda"],
            f"argument --device: expected a GPU for each of 100 processes, found {GPUS}; lower --np",
        ),
        (["--batch-size", "1"], "argument --batch-size: expected at least 2, a row for each process, found 1"),
        (["--resume", ".", "--epochs", "1"], "argument --resume: takes its settings from the run, found --epochs"),
    ],
)
def test_bad_input_is_told_once_a_machine(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for rank, local in ((0, 0), (1, 1), (2, 0)):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 100}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        try:
            code = main(["train", *arguments])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        out, err = capsys.readouterr()
        assert out == ""
        said.append(err)
    assert said[0].startswith("mtlgrad train: argument")
    assert words in said[0]
    assert said[0].count("\n") == 1
    assert said[1] == ""
    assert said[2] == said[0].replace("train: ", "train: rank 2: ", 1)
    assert os.listdir(tmp_path) == []


def refused(path):
    try:
        Comparison.resume(path)
    except TrainError as error:
        return type(error).__name__, str(error)


def test_what_rank_0_cannot_begin_it_says_alone(two_ranks, tmp_path):
    first, second = two_ranks(refused, tmp_path / "nowhere")
    assert first[0] == "TrainError"
    assert "expected a run folder or its checkpoint.pt, found" in first[1]
    assert second[0] == "ElsewhereError"


def test_an_environment_that_is_none(monkeypatch, capsys):
    for name, value in {"RANK": "first", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "mtlgrad train: environment: expected a number in RANK, as torchrun sets it, found 'first'\n"
    )


def test_a_batch_is_shared_out_in_order():
    for rows, size, count in ((41, 8, 2), (41, 8, 7), (5, 8, 3), (8, 8, 8), (0, 4, 2)):
        parts = [slices(rows, size, World("", count, rank)) for rank in range(count)]
        for batch, found in enumerate(zip(*parts, strict=True)):
            bounds = [0, *(end for _, end in found)]
            bounds[0] = batch * size
            assert bounds[-1] == min((batch + 1) * size, rows)
            assert [start for start, _ in found] == bounds[:-1]
            lengths = [end - start for start, end in found]
            assert max(lengths) - min(lengths) <= 1
        assert slices(rows, size, ALONE) == [(a, min(a + size, rows)) for a in range(0, rows, size)]


def sent(method, optimizer):
    """Bytes of an ordinary step, of one that is looked at, and of the question whether to stop."""
    settings = Settings(methods=(method,), epochs=2, batch_size=SIZE)
    trainer = training(Small(torch.device("cpu")), Job(method, 1, None, optimizer), settings)
    trainer.net.train()
    batches = list(trainer.split.shuffled(0).batches(SIZE, trainer.world))
    found = []
    for number in (0, trainer.steps - 1):
        with counted() as step:
            trainer._step(number, batches[0], [], [])
        found.append(step)
    with counted() as question:
        any_rank(False)
    return [*found, question]


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("sum", "adam"),
        ("logsum", "adam"),
        ("aligned", "adam"),
        ("aligned-ub", "adam"),
        ("pcgrad", "adam"),
        ("pcgrad-ub", "adam"),
        ("uncertainty", "adatask-adam"),
    ],
)
def test_bytes_of_a_step(two_ranks, method, optimizer):
    """docs/guide/train.md."""
    net = Small(torch.device("cpu")).net(Small.tasks)
    backbone, heads = list(net.backbone.parameters()), list(net.heads.parameters())
    e, tasks = 8, 3
    learned = tasks if method == "uncertainty" else 0
    learned_bytes = 4 * learned  # in float32
    s, h = sum(p.numel() for p in backbone), sum(p.numel() for p in heads)
    if method in ("aligned", "pcgrad") or optimizer != "adam":
        step = {"all_reduce": e * (tasks + tasks * s + h) + learned_bytes + 24 * (len(heads) + (learned > 0))}
        step["all_reduce"] += 4 * len(backbone)
        step["all_gather"] = 8
    else:
        step = {"all_reduce": e * (tasks + s + h) + 8 * len(backbone + heads)}
        step["all_reduce"] += 8 * tasks**2 if method.endswith("-ub") else 0
    step["all_reduce"] += 8 * tasks if method.startswith("pcgrad") else 0
    looked_at = dict(step)
    if method in SUMS and optimizer == "adam":
        looked_at["all_reduce"] += e * (tasks + tasks * s)
    for found in two_ranks(sent, method, optimizer):
        assert found == [step, looked_at, {"all_gather": 8}]


def begun(method):
    settings = Settings(methods=(method,), epochs=2, warmup=1, batch_size=SIZE, target="a", subset=0.5, lr=0.01)
    return training(Small(torch.device("cpu")), Job(method, 1), settings)


def continued(method, state):
    trainer = begun(method)
    trainer.load_state_dict(state)
    trainer.run_epoch(lambda *progress: None)
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


@pytest.mark.parametrize("method", ["uncertainty", "bayesagg", "alphavil"])
def test_a_run_of_one_process_goes_on_with_two(two_ranks, method):
    trainer = begun(method)
    trainer.run_epoch(lambda *progress: None)
    state = trainer.state_dict()
    both = two_ranks(continued, method, state)
    expected = continued(method, state)
    for found in both:
        assert_close(found, expected, 1e-9)
