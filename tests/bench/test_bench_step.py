"""The benchmark of training steps finds steps that are wrong, and its peers are what they are called."""

from __future__ import annotations

import csv
import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mtlgrad
from bench import bench_step, step_alphavil, step_problem
from bench.harness import Contender
from bench.peers import adatask_published, bayesagg_published, libmtl_loops, torchjd_merge
from bench.step_problem import Problem, Shape
from mtlgrad import reference
from tests.support.ranks import Program

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
THREE = {
    *("plain", "mtlgrad aligned layer", "mtlgrad aligned weigh", "mtlgrad aligned merge", "mtlgrad bayesagg"),
    *("mtlgrad adatask", "mtlgrad alphavil round", "torchjd aligned merge", "torchjd upgrad", "libmtl aligned merge"),
    "torchjd aligned per tensor",
    *("published adatask", "published bayesagg"),
}
SLOW = {"published bayesagg"}  # but for one case


@pytest.mark.slow
def test_quick_run_of_the_step_benchmark(tmp_path: Path) -> None:
    # One thread: two that wait for each other on a busy machine take ten times as long.
    options = ["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    code, _, err = Program("-m", "mtlgrad", "bench", "step", *options, folder=ROOT).end(300)
    assert code == 0, err
    with (tmp_path / "step_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for network, heads in ("resnet-18", 3), ("resnet-50", 3), ("transformer", 3), ("resnet-18", 20):
        found = [r for r in rows if r["operation"] == f"step {network}" and r["shape"].endswith(f", {heads} heads")]
        missing = THREE - {row["contender"] for row in found}
        expected = set() if (network, heads) == ("transformer", 3) else SLOW
        assert missing == (expected if heads == 3 else expected | {"mtlgrad alphavil round"})
        assert found[0]["contender"] == "plain"  # the first, whose time the others' is compared with
        for row in found:
            assert float(row["checked_error"]) <= float(row["allowed_error"]), row["contender"]
            a_round = row["contender"] == "mtlgrad alphavil round"  # a training of the batch for each task
            passed = 8 * (heads if a_round else 1)
            rate = pytest.approx(1e3 * passed / float(row["median_ms"]), rel=1e-3, abs=0.01)
            assert float(row["examples_per_s"]) == rate
            if a_round:
                assert row["method_share"] == ""
            else:
                assert float(row["method_share"]) == pytest.approx(1 - 1 / float(row["times_first"]), abs=1e-3)


def problem_of(tasks: int = 3, network: str = "resnet-18") -> Problem:
    return Problem(Shape(network, tasks, 8, (32, 32), 4 if network == "resnet-18" else 32, 2, literal=True), CPU)


def error_of(problem: Problem, contender: Contender) -> float:
    contender.prepare()
    output = contender.call()
    return output() if callable(output) else problem.error(output)


def checked(contender: Contender) -> float:
    assert isinstance(contender.bound, float)
    return contender.bound


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # TorchJD's vmap of an attention
@pytest.mark.parametrize("tasks", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_every_call_makes_the_same_step(tasks: int) -> None:
    problem = problem_of(tasks, "transformer")
    contenders = bench_step.contenders(problem)
    first = {name: error_of(problem, contender) for name, contender in contenders.items()}
    for name, contender in reversed(contenders.items()):
        again = error_of(problem, contender)
        assert again <= checked(contender), name
        assert again == pytest.approx(first[name], abs=1e-6), name


def planted(name: str, patch: pytest.MonkeyPatch, problem: Problem) -> Contender:
    """The contender with a mistake of a few percent in it."""

    def scaled(function):
        return lambda *args, **options: 1.03 * function(*args, **options)

    if name == "plain":
        patch.setattr(bench_step, "sum_of", lambda losses: torch.stack([1.03 * losses[0], *losses[1:]]).sum())
    elif "aligned" in name and name.startswith("mtlgrad"):
        patch.setattr(mtlgrad, "AlignedMTL", functools.partial(mtlgrad.AlignedMTL, preference=[1.0, 1.03, 1.0]))
    elif name == "mtlgrad bayesagg":
        patch.setattr(mtlgrad, "Regression", functools.partial(mtlgrad.Regression, power=0.9))
    elif name == "mtlgrad adatask":
        problem.adatask.param_groups[0]["betas"] = (0.9, 0.99)
    elif name == "mtlgrad alphavil round":
        vil = bench_step.alphavil(problem)
        patch.setattr(step_alphavil, "ALPHA_LR", 1.03 * step_alphavil.ALPHA_LR)  # what is expected
        return vil
    elif name.startswith("torchjd aligned"):
        patch.setattr(torchjd_merge, "to_grad", lambda parameters, *_, **__: torchjd_merge.upgrad_to_grad(parameters))
    elif name == "torchjd upgrad":
        patch.setattr(
            torchjd_merge,
            "upgrad_to_grad",
            lambda ps: [setattr(p, "grad", p.jac.mean(0)) or delattr(p, "jac") for p in ps],
        )
    elif name == "libmtl aligned merge":
        patch.setattr(libmtl_loops, "aligned", scaled(libmtl_loops.aligned))
    elif name == "published adatask":
        correct = adatask_published.adam
        patch.setattr(adatask_published, "adam", lambda *args: correct(*args[:-3], 1.03 * args[-3], *args[-2:]))
    else:
        patch.setattr(bayesagg_published, "aggregate", lambda means, *_: torch.cat(list(means), 1).sum(1) / 8)
    return bench_step.contenders(problem)[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(THREE))
def test_a_wrong_step_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = problem_of()
    contender = bench_step.contenders(right)[name]
    assert error_of(right, contender) <= checked(contender)
    problem = problem_of()
    with monkeypatch.context() as patch:
        wrong = planted(name, patch, problem)
        assert error_of(problem, wrong) > checked(wrong)


FORMS = ("sum", "features", "weighed", "parameters", "upgrad", "adatask", "bayesagg", "bayesagg full")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_forms_differ_by_more_than_is_allowed(form: str) -> None:
    problem = problem_of()
    assert set(problem.exact) == set(FORMS)
    allowed = {"bayesagg": bench_step.POINTS, "bayesagg full": bench_step.MONTE_CARLO}.get(form, bench_step.ROUNDING)
    for other, change in problem.exact.items():
        if {form, other} == {"bayesagg", "bayesagg full"}:
            continue  # these two differ by less
        after = [begin + part for begin, part in zip(problem.begin, change, strict=True)]
        error = problem.difference(after, problem.exact[form])
        assert error < 1e-5 if other == form else error > allowed


def test_no_step_and_nan_are_wrong() -> None:
    problem = problem_of()
    problem.prepare(problem.adam)
    assert problem.error("sum") == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        problem.own[0][0, 0] = torch.nan
    assert problem.error("sum") == torch.inf


def test_the_expected_steps_of_adam_are_torch_s_own() -> None:
    """In float64, with gradients far from and near to zero."""
    gradient = torch.tensor([0.0, 1e-9, -1e-3, 0.5, -30.0], dtype=torch.float64)
    scale, p = 0.2, torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([p], step_problem.LR, step_problem.BETAS, step_problem.EPS)
    moments = {"exp_avg": torch.full_like(p, 0.5 * scale), "exp_avg_sq": torch.full_like(p, scale**2)}
    optimizer.state[p] = {"step": torch.tensor(step_problem.STEPS), **moments}
    p.grad = gradient
    optimizer.step()
    assert torch.allclose(p.detach().float(), step_problem.adam(gradient, scale), rtol=1e-6, atol=0)


# UPGrad ---------------------------------------------------------------------------------------------------------------


def gram_of(tasks: int, columns: int, seed: int, common: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, columns, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(-1, 1, tasks, dtype=torch.float64)[:, None]
    rows += common * torch.randn(columns, generator=generator, dtype=torch.float64)
    return rows @ rows.mT


def ridged(gram: Tensor) -> Tensor:
    return gram / gram.trace() + torchjd_merge.RIDGE * torch.eye(len(gram), dtype=gram.dtype)


def by_enumeration(gram: Tensor) -> Tensor:
    """UPGrad's weights: of all sets of bounds that hold with equality the one with the least v'Gv among feasible v."""
    tasks, matrix = len(gram), ridged(gram)
    total = torch.zeros(tasks, dtype=torch.float64)
    for bound in torch.eye(tasks, dtype=torch.float64) / tasks:
        best: tuple[float, Tensor] | None = None
        for choice in itertools.product((False, True), repeat=tasks):
            free, v = torch.tensor(choice), bound.clone()
            v[free] = torch.linalg.solve(matrix[free][:, free], -(matrix[free][:, ~free] @ bound[~free]))
            value = float(v @ matrix @ v)
            if (v >= bound - 1e-12).all() and (best is None or value < best[0]):
                best = value, v
        assert best is not None
        total += best[1]
    return total


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_upgrad_is_the_least_of_all_active_sets(tasks: int) -> None:
    for seed in range(20):
        gram = gram_of(tasks, 4, seed)
        expected = by_enumeration(gram)
        assert torch.allclose(step_problem.upgrad(gram), expected, rtol=1e-9, atol=1e-10)


def test_upgrad_conflicts_with_no_task() -> None:
    """The property it is made for, and TorchJD's own result."""
    pytest.importorskip("qpsolvers")
    conflicts = 0
    for seed in range(10):
        gram = gram_of(20, 50, seed, common=0.5)
        weights = step_problem.upgrad(gram)
        assert (ridged(gram) @ weights >= -1e-12).all()
        conflicts += int((gram.mean(1) < 0).any())
        theirs = torchjd_merge.upgrad().gramian_weighting(gram)
        assert torch.allclose(weights, theirs, rtol=1e-8, atol=1e-10)
    assert conflicts > 0


def test_upgrad_is_the_mean_where_nothing_conflicts() -> None:
    gram = gram_of(4, 100, 0).abs()
    assert torch.equal(step_problem.upgrad(gram), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("tasks", [3, 20])
def test_tasks_of_the_benchmark_conflict(tasks: int) -> None:
    """Else UPGrad would be the mean of the gradients, and its check could not tell them apart."""
    problem = problem_of(tasks)
    problem.restore()
    losses = problem.start()[1]
    rows = [torch.autograd.grad(loss, problem.shared, retain_graph=True) for loss in losses]
    weights = step_problem.upgrad(reference.gram(rows))
    assert (weights * tasks - 1).max() > 0.01


# The loops of libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "columns"), [(1, 5), (3, 40), (8, 100), (4, 2)])
def test_the_libmtl_loop_aligns_as_the_reference(tasks: int, columns: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(tasks, columns, dtype=torch.float64) * torch.arange(1, tasks + 1)[:, None]
    expected = reference.align(rows @ rows.mT).weights @ rows
    assert torch.allclose(libmtl_loops.aligned(rows), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(libmtl_loops.aligned(0 * rows), 0 * rows[0])


def test_the_libmtl_loop_collects_and_writes_back_by_parameter() -> None:
    problem = problem_of()
    problem.restore()
    losses = problem.start()[1]
    matrix = libmtl_loops.collect(losses, problem.shared)
    for row, loss in zip(matrix, losses, strict=True):
        gradients = torch.autograd.grad(loss, problem.shared, retain_graph=True)
        assert torch.equal(row, torch.cat([g.reshape(-1) for g in gradients]))
    libmtl_loops.write_back(matrix[1], problem.shared)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in problem.shared]), matrix[1])
    assert all(p.grad.shape == p.shape for p in problem.shared)
