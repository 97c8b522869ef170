"""The two-task landscape: its formulas, what is claimed on it, and what the command leaves on disk."""

import csv
import os
import struct

import pytest
import torch

from mtlgrad.cli import main
from mtlgrad.recipes import toy

LOWEST = 5e-6


def as_published(x1, x2):
    """CAGrad's two losses at a point, term by term."""
    c1 = torch.tanh(0.5 * x2).clamp_min(0)
    c2 = torch.tanh(-0.5 * x2).clamp_min(0)
    f1 = torch.log((0.5 * (-x1 - 7) - torch.tanh(-x2)).abs().clamp_min(LOWEST)) + 6
    f2 = torch.log((0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs().clamp_min(LOWEST)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return torch.stack([f1 * c1 + g1 * c2, f2 * c1 + g2 * c2], -1)


@pytest.fixture(scope="module")
def grid():
    axis = torch.linspace(-11, 11, 500, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def test_losses_are_the_published_ones(grid):
    assert torch.allclose(toy.losses(grid), as_published(*grid.unbind(1)), rtol=1e-12)
    floor = torch.tensor([[-7 + 2 * torch.tanh(torch.tensor(2.0)), 2.0]], dtype=torch.float32)
    assert torch.isfinite(toy.losses(floor)).all()  # on a valley's floor, the logarithm of nearly nothing


def test_gradients_are_each_tasks_own():
    x = torch.tensor(toy.STARTS, dtype=torch.float64)
    rows = toy.gradients(x)
    for i in range(len(x)):
        assert torch.allclose(rows[i], torch.autograd.functional.jacobian(toy.losses, x[i]))


@pytest.mark.parametrize("preference", [(1.0, 1.0), (0.7, 0.3), (0.05, 0.95), (3.0, 1.0)])
def test_no_point_of_a_grid_is_better_than_the_optimum(grid, preference):
    weights = torch.tensor(preference, dtype=torch.float64)
    best = toy.optimum(preference)
    assert (toy.losses(grid) @ weights).min() >= toy.losses(best) @ weights
    gradient = torch.autograd.functional.jacobian(lambda x: toy.losses(x) @ weights, best)
    assert gradient.abs().max() < 1e-3


def test_no_point_of_a_grid_dominates_the_front(grid):
    values = toy.losses(grid)
    for point in toy.losses(toy.pareto_front(9)):
        assert not ((values < point - 1e-3).all(1)).any()


@pytest.mark.slow
def test_aligned_mtl_ends_at_the_preferences_optimum_from_every_start_and_the_sum_does_not():
    # Half of the published steps at twice the rate, and some more; see the comment at `descend`.
    chosen = [method for method in toy.methods((0.7, 0.3)) if method.preference == (0.7, 0.3)]
    ends = toy.descend(chosen, 22_000, 2e-3, "min", 1000, lambda step: None)[-1]
    found = toy.outcomes(chosen, ends)
    aligned = [end for end in found if end.method.rule.title == "Aligned-MTL"]
    assert len(aligned) == 5
    assert all(end.reached for end in aligned), [end.distance for end in aligned]
    weighted = {end.start: end for end in found if end.method.rule.title == "sum"}
    stuck = {start for start, end in weighted.items() if not end.reached}
    assert stuck == {(-8.5, 7.5), (9.0, 9.0)}
    assert all(weighted[start].distance > 10 for start in stuck)
    assert all(weighted[start].point[1] > 0 for start in stuck)  # still in their valleys


@pytest.mark.slow
def test_rules_end_on_the_front_and_those_that_go_for_an_optimum_there():
    starts = ((9.0, -1.0),)  # below the valleys, where all get on
    chosen = toy.methods((0.7, 0.3), [name for name in toy.RULES if name != "aligned"])
    ends = toy.descend(chosen, 2200, 2e-2, "min", 2200, lambda step: None, starts)[-1]
    found = {end.method.name: end for end in toy.outcomes(chosen, ends, starts)}
    assert len(found) == 12
    assert all(end.reached for end in found.values()), {name: end.distance for name, end in found.items()}
    assert {name for name, end in found.items() if end.method.goal == (1.0, 1.0)} == {"sum", "CAGrad"}
    # The others stay on their side, each where its weights lead; those of UPGrad are half of PCGrad's, of two tasks.
    places = [found[name].point[0] for name in ("DualProj", "UPGrad", "IMTL-G", "Nash-MTL", "FairGrad", "MGDA")]
    assert torch.tensor(places).diff().min() > 0.1
    assert places[0] > 3.0
    assert found["PCGrad"].point[0] == pytest.approx(places[1], abs=1e-2)


def test_distances_are_to_the_nearest_point_of_a_goal():
    line = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 5.0]])
    for point, expected in (
        ([1.0, 1.0], 1.0),
        ([-3.0, 4.0], 5.0),
        ([2.0, 6.0], 1.0),
        ([2.5, 2.0], 0.5),
        ([3, -1], 2**0.5),
    ):
        assert toy._distance(torch.tensor(point), line) == pytest.approx(expected)
    assert toy._distance(torch.tensor([1.0, 1.0]), line[:1]) == pytest.approx(2**0.5)
    between = toy.optimum((0.5125, 0.4875))  # of two points of the front
    [end] = toy.outcomes(toy.methods((1.0, 1.0), ["mgda"]), between[None, None], [(0.0, 0.0)])
    assert end.distance < 0.01


# ---- the command


def run(*arguments):
    try:
        return main(["toy", *arguments])
    except SystemExit as stop:  # argparse's way out
        return stop.code


def test_a_short_run_leaves_a_figure_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--steps", "120", "--preference", "2", "1", "--scale", "rmse", "--name", "x") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "Aligned-MTL, preference 2, 1" in out
    assert sorted(os.listdir("runs")) == ["x"]
    assert sorted(os.listdir("runs/x")) == ["results.csv", "toy.png"]
    with open("runs/x/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5
    assert {(float(r["start_1"]), float(r["start_2"])) for r in rows} == set(toy.STARTS)
    for row in rows:
        end = torch.tensor([float(row["end_1"]), float(row["end_2"])], dtype=torch.float64)
        assert toy.losses(end).tolist() == pytest.approx([float(row["loss_1"]), float(row["loss_2"])])
    with open("runs/x/toy.png", "rb") as file:
        image = file.read()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", image[16:24])
    assert width > height > 500

    assert run("--steps", "120", "--name", "x") == 2  # nothing is overwritten
    assert capsys.readouterr().err == "mtlgrad toy: argument --name: expected a new name, found runs/x; take another\n"
    assert sorted(os.listdir("runs")) == ["x"]


@pytest.mark.slow
def test_rules_of_the_users_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = "cagrad upgrad cagrad mgda nash fairgrad imtl pcgrad dualproj"
    assert run("--methods", *names.split(), "--steps", "20", "--preference", "2", "1", "--name", "x") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "learning rate 0.001, five starts" in out  # no scale
    assert "distance to its optimum or the Pareto front" in out
    assert "its optimum (within 0.1, in loss space) reached from, of 5 starts: CAGrad: 0\n" in out
    assert (
        "the Pareto front (within 0.1, in loss space) reached from, of 5 starts: UPGrad: 0; UPGrad, preference" in out
    )
    with open("runs/x/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    titles = [
        "CAGrad",
        "UPGrad",
        "UPGrad, preference 2, 1",
        "MGDA",
        "Nash-MTL",
        "FairGrad",
        "IMTL-G",
        "PCGrad",
        "DualProj",
    ]
    titles.append("DualProj, preference 2, 1")
    assert list(dict.fromkeys(row["method"] for row in rows)) == titles
    assert {(r["weight_1"], r["weight_2"]) for r in rows[:5]} == {("1.0", "1.0")}
    assert {(r["weight_1"], r["weight_2"]) for r in rows[5:]} == {("", "")}  # judged by the front
    with open("runs/x/toy.png", "rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    assert 1500 < width < 2200  # five beside each other, in two rows
    assert 1500 < height < 1800


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--methods bayesagg",
            "argument --methods: expected one of sum, aligned, upgrad, dualproj, mgda, cagrad, nash",
        ),
        ("--methods", "argument --methods: expected at least one argument"),
        (
            "--methods mgda nash --preference 1 2",
            "argument --preference: expected with sum or aligned or upgrad or dualproj, found mgda, nash; drop it",
        ),
        ("--methods sum mgda --scale rmse", "argument --scale: expected with aligned, found sum, mgda; drop it"),
        ("--preference 0.7", "argument --preference: expected 2 arguments"),
        ("--preference 0.7 -0.3", "argument --preference: expected a number from 0, found '-0.3'"),
        ("--preference 0 0", "argument --preference: expected 2 numbers, one a task (task 1, task 2), not all 0"),
        ("--steps 0", "argument --steps: expected a whole number from 1 to"),
        ("--lr 0", "argument --lr: expected a number above 0, found '0'"),
        ("--scale max", "argument --scale: expected one of min, median, rmse, found 'max'"),
        ("--name a/b", "argument --name: expected the plain name of a folder, found 'a/b'"),
        ("--out FILE", "argument --out: expected a folder to write in, found FILE: Not a directory; choose another"),
        ("--out FILE/deep", "argument --out: expected a folder to write in, found FILE/deep: Not a directory"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_folder(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("mtlgrad toy: ")
    assert err.count("\n") == 1
    assert out == ""
    assert os.listdir(tmp_path) == ["FILE"]


@pytest.mark.parametrize("what", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def breaks(*arguments):
        raise what

    monkeypatch.setattr("mtlgrad.plots.landscape", breaks)
    if what is KeyboardInterrupt:
        assert run("--steps", "10") == 130
    else:
        with pytest.raises(RuntimeError):
            run("--steps", "10")
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_asked_to_stop_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mtlgrad.cli.Stop.requested", True)
    assert run("--steps", "1000") == 130
    assert "stopped; nothing was written" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_a_diverging_run_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--steps", "60", "--lr", "1e30") == 2
    words = "argument --lr: expected one at which the descents stay finite, found 1e+30; lower it"
    assert capsys.readouterr().err == f"mtlgrad toy: {words}\n"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert run("--steps", "10") == 2
    reason = "expected a folder to write in, found runs: No space left on device; choose another"
    assert capsys.readouterr().err == f"mtlgrad toy: argument --out: {reason}\n"
    assert os.listdir(tmp_path) == []
