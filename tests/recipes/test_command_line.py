"""``mtlgrad train``, ``recipe`` and ``info`` as a user types them: outputs, exit codes, signals, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtlgrad.cli import main
from mtlgrad.recipes.methods import METHODS
from tests.recipes.test_comparison import rows_of
from tests.support.ranks import Program, free_port, rank_variables

TEXT = """
import time
from pathlib import Path
from tests.recipes.small_recipe import Small

class Slow(Small):
    batch_size = 8
    def model(self):
        time.sleep({pause})
        return super().model()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two recipes in it."""
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "mine.py").write_text(TEXT.format(pause=0))
    (tmp_path / "slow.py").write_text(TEXT.format(pause=0.7))
    return tmp_path


def command(*arguments):
    return [sys.executable, "-m", "mtlgrad", *arguments]


def done(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


MINE = ["train", "--recipe", "mine.py"]
WITH = "sum, aligned or "


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--methods", "argument --methods: expected at least one argument"),
        ("--methods best", f"argument --methods: expected one of {', '.join(METHODS)}, found 'best'"),
        ("--seeds 0", "argument --seeds: expected a whole number from 1 to 1000, found '0'"),
        ("--epochs 1.5", "argument --epochs: expected a whole number from 1 to 100000, found '1.5'"),
        ("--lr 1e-3 0", "argument --lr: expected a number above 0, found '0'"),
        ("--lr nan", "argument --lr: expected a number above 0, found 'nan'"),
        ("--lr 1e-3 --tune-lr", "argument --tune-lr: expected it or --lr, found both; drop one"),
        ("--preference 1 2", "argument --preference: expected 3 numbers, one a task (a, b, c), found 2"),
        ("--preference 0 0 0", "one a task (a, b, c), not all 0; found zeros alone"),
        ("--preference -1 1 1", "argument --preference: expected a number from 0, found '-1'"),
        ("--methods mgda --preference 1 1 1", "found mgda; drop it"),
        ("--methods alphavil", "argument --target: expected one of a, b, c with alphavil, found none"),
        ("--methods alphavil --target d", "argument --target: expected one of a, b, c with alphavil, found 'd'"),
        ("--methods sum --target a", "argument --target: expected with alphavil, found sum; drop it"),
        ("--device tpu", "argument --device: expected cpu, cuda or cuda:N, found 'tpu'"),
        ("--device cuda:99", "argument --device: expected a usable device, found cuda:99"),
        ("--name a/b", "argument --name: expected the plain name of a folder, found 'a/b'"),
        (
            "--out mine.py",
            "argument --out: expected a folder to write in, found mine.py: Not a directory; choose another",
        ),
        ("--out mine.py/sub", "argument --out"),
        ("--resume nowhere", "argument --resume: takes its settings from the run, found --recipe as well; drop it"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_folder(folder, capsys, arguments, words):
    refused([*MINE, *arguments.split()], capsys, words)
    assert sorted(name for name in os.listdir() if name != "__pycache__") == ["mine.py", "slow.py"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--recipe lake", "argument --recipe: expected one of chestxray, cifar-mtl"),
        (
            "--recipe gone.py",
            "argument --recipe: expected a file, found none at gone.py; `mtlgrad recipe > my_recipe.py`",
        ),
        (
            "--resume nowhere",
            "argument --resume: expected a run folder or its checkpoint.pt, found none at nowhere",
        ),
        ("--resume mine.py", "argument --resume: expected a run folder"),
        (
            "--resume . --epochs 3",
            "argument --resume: takes its settings from the run, found --epochs as well; drop it",
        ),
    ],
)
def test_what_is_not_there(folder, capsys, arguments, words):
    refused(["train", *arguments.split()], capsys, words)


def refused(arguments, capsys, words):
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert words in err
    assert err.startswith("mtlgrad train: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("name", ["rich", "matplotlib"])
def test_a_missing_extra_is_named(name, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    refused(MINE, capsys, f"mtlgrad train: needs {name}, not found; pip install 'mtlgrad[train]'\n")


def test_info(capsys):
    import mtlgrad

    assert main(["info"]) == 0
    plain = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == mtlgrad.build_info().keys()
    for key in mtlgrad.build_info():
        assert key in plain


@pytest.mark.slow
def test_the_template_runs_as_it_is(folder):
    (folder / "my_recipe.py").write_text(done("recipe").stdout)
    methods = ["sum", "logsum", "bayesagg", "aligned-ub"]
    found = done("train", "--recipe", "my_recipe.py", "--methods", *methods, "--seeds", "1", "--epochs", "2")
    assert (found.returncode, found.stderr) == (0, "")
    for words in ("price: MAE ($) ↓", "sold: AUC ↑", "is best here", *methods):
        assert words in found.stdout


@pytest.mark.slow
def test_a_run_without_a_terminal_is_quiet_not_silent(folder):
    arguments = ["--methods", "sum", "adatask", "--seeds", "1", "--lr", "1e-3", "1e-2", "--name", "x"]
    found = done(*MINE, *arguments)
    assert (found.returncode, found.stderr) == (0, "")
    assert sum(line.startswith("[") for line in found.stdout.splitlines()) == 10  # a line a training
    for word in ("single-task", "adatask", "a: RMSE", "Δm", "ms a step", "runs/x", "chosen on the validation split"):
        assert word in found.stdout
    assert "\x1b" not in found.stdout
    assert sorted(os.listdir("runs/x")) == [
        "checkpoint.pt", "dominance.png", "history.csv", "loss_curves.png", "results.csv", "task_weights.png",
    ]  # fmt: skip
    [(code, out, _)] = ends(begin("train", "--resume", "runs/x", size=1))  # a finished run shows its table again
    assert code == 0
    assert found.stdout.splitlines()[-8:] == out.splitlines()[-8:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_then_resumed(number, folder):
    arguments = ["train", "--recipe", "slow.py", "--methods", "sum", "--seeds", "1", "--epochs", "3", "--name"]
    [begun] = begin(*arguments, "x", size=1)
    wait_for("runs/x/results.csv", [begun])  # of the first training
    os.kill(begun.process.pid, number)
    code, out, err = begun.end()
    assert (code, err) == (130, "")
    assert "stopped; what was done is saved: mtlgrad train --resume runs/x" in out
    assert {"checkpoint.pt", "history.csv", "results.csv"} == set(os.listdir("runs/x"))
    if number == signal.SIGINT:  # once is enough
        again = [*begin("train", "--resume", "runs/x", size=1), *begin(*arguments, "whole", size=1)]
        assert [code for code, *_ in ends(again)] == [0, 0]
        assert rows_of(folder / "runs/x/results.csv") == rows_of(folder / "runs/whole/results.csv")


def wait_for(path, begun):
    give_up = time.monotonic() + 120
    while not os.path.exists(path):
        assert all(each.process.exitcode is None for each in begun)
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(folder):
    arguments = command(*MINE, "--methods", "sum")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 1


# ---- several processes, as torchrun starts them


def begin(*arguments, size=2):
    """On so many ranks, or on one."""
    port = free_port()
    each = [rank_variables(rank, size, port) if size > 1 else {} for rank in range(size)]
    return [Program("-m", "mtlgrad", *arguments, environment=own) for own in each]


def ends(begun):
    return [each.end() for each in begun]


@pytest.mark.slow
def test_a_killed_rank_stops_all_and_the_run_goes_on_as_if_nothing_had_been(folder):
    arguments = ["train", "--recipe", "slow.py", "--methods", "uncertainty", "--seeds", "1", "--name"]
    begun = begin(*arguments, "hurt")
    wait_for("runs/hurt/results.csv", begun)
    begun[1].process.kill()
    (code, _, err), (killed, *_) = ends(begun)
    assert killed == -signal.SIGKILL
    assert code == 2
    assert err.startswith("mtlgrad train: rank 0: ")
    assert err.endswith("what was done is saved: --resume runs/hurt\n")
    assert err.count("\n") == 1
    assert not [name for name in os.listdir("runs/hurt") if name.endswith(".tmp")]

    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    rest = subprocess.run([*launch, "-m", "mtlgrad", "train", "--resume", "runs/hurt"],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (rest.returncode, rest.stderr) == (0, "")
    assert rest.stdout.count("run folder runs/hurt") == 1
    assert [code for code, *_ in ends(begin(*arguments, "whole"))] == [0, 0]
    assert rows_of(folder / "runs/hurt/results.csv") == rows_of(folder / "runs/whole/results.csv")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(folder):
    begun = begin("train", "--recipe", "slow.py", "--methods", "sum", "--epochs", "500", "--name", "x")
    wait_for("runs/x/checkpoint.pt", begun)
    time.sleep(2.0)
    begun[1].process.terminate()
    (code, out, err), other = ends(begun)
    assert (code, err) == (130, "")
    assert "stopped; what was done is saved: mtlgrad train --resume runs/x" in out
    assert other == (130, "", "")


@pytest.mark.slow
def test_what_is_wrong_everywhere_is_said_once(folder):
    os.makedirs("runs/x")
    for arguments, words in (
        (["--epochs", "0"], "mtlgrad train: argument --epochs: expected a whole number from 1 to 100000, found '0'\n"),
        (["--name", "x"], "mtlgrad train: argument --name: expected a new name, found runs/x; take another\n"),
    ):
        (first, out, err), other = ends(begin(*MINE, *arguments))
        assert (first, out, err) == (2, "", words)
        assert other == (2, "", "")
