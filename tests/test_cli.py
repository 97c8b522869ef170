"""The command line, as a user meets it: also a careless or a hostile one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mtlgrad.cli import _settings, main

METHODS = (
    "sum, uncertainty, logsum, aligned, aligned-ub, upgrad, upgrad-ub, dualproj, dualproj-ub, mgda, mgda-ub, cagrad, "
    "cagrad-ub, nash, nash-ub, fairgrad, fairgrad-ub, imtl, imtl-ub, pcgrad, pcgrad-ub, bayesagg, alphavil, diw"
)
PREFERRING = "aligned or aligned-ub or upgrad or upgrad-ub or dualproj or dualproj-ub"
FAST = ["--seeds", "1", "--epochs", "2", "--batch-size", "1024"]


def command(*arguments):
    return [sys.executable, "-m", "mtlgrad", *arguments]


def train(*arguments, cwd):
    return subprocess.run(command("train", *arguments), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--method magic", f"argument --method: expected one of {METHODS}, found 'magic'"),
        (
            "--compare sum magic",
            f"argument --compare: expected one of {METHODS}, found 'magic'",
        ),
        ("--method sum --compare sum", "argument --compare: not allowed with argument --method"),
        ("--data celeba", "argument --data: expected one of clothing, river, multimnist, found 'celeba'"),
        ("--epochs 0", "argument --epochs: expected a whole number from 1 to 100000, found '0'"),
        ("--epochs -3", "found '-3'"),
        ("--epochs 2.5", "found '2.5'"),
        ("--seeds 0", "argument --seeds: expected a whole number from 1 to 1000, found '0'"),
        ("--seeds 999999999999999999999", "argument --seeds: expected a whole number from 1 to 1000"),
        ("--batch-size 0", "argument --batch-size"),
        ("--lr nan", "argument --lr: expected a number above 0, found 'nan'"),
        ("--gamma 0", "argument --gamma: expected a number above 0, found '0'"),
        ("--power 0.3 -1", "argument --power: expected"),
        ("--method aligned --preference 1 2", "expected 4 numbers, one a task (rating, recommended, department, age)"),
        (
            "--data river --method aligned --preference 1 2",
            "argument --preference: expected 8 numbers, one a task (CHSI2",
        ),
        ("--method aligned --preference 1 1 1 -1", "argument --preference: expected a number from 0, found '-1'"),
        ("--method aligned --preference 1 1 1 nan", "argument --preference: expected a number from 0, found 'nan'"),
        ("--method aligned-ub --preference 0 0 0 0", "not all 0; found zeros alone"),
        (
            "--compare sum bayesagg --preference 1 1 1 1",
            f"argument --preference: expected with {PREFERRING}, found sum, bayesagg; drop it",
        ),
        (
            "--method dualproj-ub --preference 1 2",
            "expected 4 numbers, one a task (rating, recommended, department, age)",
        ),
        ("--method mgda --preference 1 1 1 1", f"expected with {PREFERRING}, found mgda; drop it"),
        (
            "--method upgrad --scale rmse",
            "argument --scale: expected with aligned or aligned-ub, found upgrad; drop it",
        ),
        ("--scale rmse", "argument --scale: expected with aligned or aligned-ub, found bayesagg; drop it"),
        ("--method aligned --scale max", "argument --scale: expected one of min, median, rmse, found 'max'"),
        (
            "--method sum --optimizer sgd",
            "argument --optimizer: expected one of adam, adatask-adam, adatask-rmsprop, adatask-adagrad, found 'sgd'",
        ),
        ("--optimizer", "argument --optimizer: expected at least one argument"),
        (
            "--compare sum nash-ub bayesagg --optimizer adam adatask-adam",
            "argument --optimizer: expected adam with nash-ub, bayesagg, whose one merged gradient leaves nothing to "
            "keep apart, found adatask-adam; take methods among sum, uncertainty, logsum",
        ),
        ("--resume . --optimizer adam", "takes its settings from the run, found --optimizer as well; drop it"),
        ("--device tpu", "argument --device: expected cpu, cuda or cuda:N, found 'tpu'"),
        ("--device cuda:99", "argument --device: expected a usable device, found cuda:99"),
        ("--name a/b", "argument --name: expected the plain name of a folder, found 'a/b'"),
        ("--out FILE", "argument --out: expected a folder to write in, found FILE: Not a directory; choose another"),
        ("--out FILE/sub", "argument --out"),
        (
            "--resume nowhere",
            "argument --resume: expected a run folder or its checkpoint.pt, found nowhere: No such file",
        ),
        ("--resume FILE", "found FILE: damaged, or of another program or version; start anew without --resume"),
        (
            "--resume . --epochs 3",
            "argument --resume: takes its settings from the run, found --epochs as well; drop it",
        ),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_folder(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("not a checkpoint")
    try:
        code = main(["train", *arguments.split()])
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert words in err
    assert err.startswith("mtlgrad")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert out == ""
    assert os.listdir(tmp_path) == ["FILE"]


@pytest.mark.parametrize("name", ["rich", "matplotlib"])
def test_a_missing_extra_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert err == f"mtlgrad train: needs {name}, not found; pip install 'mtlgrad[train]'\n"
    assert os.listdir(tmp_path) == []


def test_info(capsys):
    import mtlgrad

    assert main(["info"]) == 0
    plain = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == mtlgrad.build_info().keys()
    for key in mtlgrad.build_info():
        assert key in plain


def test_a_run_without_a_terminal_is_quiet_not_silent(tmp_path):
    done = train("--compare", "sum", "uncertainty", *FAST, "--name", "x", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert sum(line.startswith("[") for line in lines) == 6  # a line a training
    for word in ("single-task", "uncertainty", "rating: RMSE", "Δm", "ms a step", "runs/x"):
        assert word in done.stdout
    assert "\x1b" not in done.stdout
    assert sorted(os.listdir(tmp_path / "runs" / "x")) == [
        "checkpoint.pt", "dominance.csv", "dominance.png", "history.csv", "loss_curves.png", "model-sum-0.pt",
        "model-uncertainty-0.pt", "results.csv", "task_weights.png",
    ]  # fmt: skip
    # A finished run shows its table again.
    again = train("--resume", "runs/x", cwd=tmp_path)
    assert again.returncode == 0
    assert lines[-12:] == again.stdout.splitlines()[-12:]


@pytest.mark.parametrize(
    ("arguments", "methods", "optimizers"),
    [
        ({"optimizer": ["adatask-adam", "adam", "adatask-adam"]}, ("sum",), ("adatask-adam", "adam")),
        ({"optimizer": ["adatask-adagrad"], "method": "logsum"}, ("logsum",), ("adatask-adagrad",)),
        ({"optimizer": ["adam"]}, ("bayesagg",), ("adam",)),
        ({}, ("bayesagg",), ("adam",)),
    ],
)
def test_an_optimizer_that_keeps_tasks_apart_takes_the_sum_unless_told(arguments, methods, optimizers):
    settings = _settings(arguments)
    assert (settings.methods, settings.optimizers) == (methods, optimizers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_then_resumed(number, tmp_path):
    arguments = ["--method", "sum", "--seeds", "1", "--epochs", "3", "--batch-size", "512", "--name"]
    process = subprocess.Popen(
        command("train", *arguments, "x"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoint = tmp_path / "runs" / "x" / "checkpoint.pt"
    give_up = time.monotonic() + 120
    while not (checkpoint.exists() and checkpoint.stat().st_size > 100_000):  # the first epoch is saved
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "stopped; what was done is saved: mtlgrad train --resume runs/x" in out
    assert {"checkpoint.pt", "history.csv", "results.csv"} <= set(os.listdir(checkpoint.parent))
    assert len((checkpoint.parent / "history.csv").read_text().splitlines()) > 1

    if number == signal.SIGINT:  # once is enough: bit for bit what a run without an interruption gives
        assert train("--resume", "runs/x", cwd=tmp_path).returncode == 0
        assert train(*arguments, "whole", cwd=tmp_path).returncode == 0
        files = [(tmp_path / "runs" / name / "results.csv").read_text() for name in ("x", "whole")]
        assert files[0] == files[1]


def test_two_processes_with_one_out(tmp_path):
    arguments = command("train", "--method", "sum", "--seeds", "1", "--epochs", "1", "--batch-size", "4096")
    both = [subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    folders = os.listdir(tmp_path / "runs")
    assert len(folders) == 2
    for name in folders:
        assert "task_weights.png" in os.listdir(tmp_path / "runs" / name)


def test_a_closed_pipe_is_no_traceback(tmp_path):
    arguments = command("train", "--method", "sum", *FAST)
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 1
