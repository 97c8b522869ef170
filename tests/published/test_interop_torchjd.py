"""TorchJD and this package on each other's ``.jac``, and the aggregator that stands in for TorchJD's."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torchjd.aggregation
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

import mtlgrad
from mtlgrad import reference
from mtlgrad.interop.torchjd import AlignedMTL, AlignedMTLWeighting

Theirs = torchjd.aggregation.AlignedMTL
MODES = ("min", "median", "rmse")


def rows(tasks, columns, seed=0, dtype=torch.float64):
    """Gradients whose singular values are 1, 2, ... tasks."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(tasks, tasks, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, tasks, generator=generator, dtype=torch.float64))[0]
    return (left @ torch.diag(1.0 + torch.arange(tasks)).double() @ right.mT).to(dtype)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


class Problem:
    """A backbone of one convolution and one linear layer, three heads; well conditioned."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(27, 16), torch.nn.Tanh()
        )
        self.heads = torch.nn.ModuleList(torch.nn.Linear(16, width) for width in (1, 2, 3))
        self.inputs = torch.randn(8, 2, 5, 5)

    def forward(self):
        features = self.backbone(self.inputs)
        return [head(features).square().mean() * (t + 1) for t, head in enumerate(self.heads)], features

    def ours(self, through_features=True):
        losses, features = self.forward()
        mtlgrad.task_backward(losses, self.shared, features=features if through_features else None)
        return self

    def theirs(self):
        losses, features = self.forward()
        mtl_backward(losses, features=features)
        return self

    @property
    def shared(self):
        return list(self.backbone.parameters())

    def jacobian(self):
        return torch.cat([p.jac.flatten(1) for p in self.shared], 1)

    def gradient(self):
        assert not any(hasattr(p, "jac") for p in self.shared)
        return torch.cat([p.grad.flatten() for p in self.shared])


def merged(problem, how):
    """The gradient of the shared parameters, by each way from ``.jac`` to ``.grad``."""
    if how == "merge":
        mtlgrad.AlignedMTL(3, preference=[1 / 3] * 3).merge(problem.shared)
    else:
        aggregator = Theirs() if how == "theirs" else AlignedMTL()
        jac_to_grad(problem.shared, aggregator, optimize_gramian_computation=how == "gramian")
    return problem.gradient()


# ---- .jac of either, aggregated by either ----------------------------------------------------------------------------


@pytest.mark.parametrize("through_features", [True, False])
def test_backward_of_either_leaves_the_same(through_features):
    ours, theirs = Problem().ours(through_features), Problem().theirs()
    close(ours.jacobian(), theirs.jacobian(), 1e-6)
    for found, expected in zip(ours.heads.parameters(), theirs.heads.parameters()):
        close(found.grad, expected.grad, 1e-6)


@pytest.mark.parametrize("made_by", ["ours", "theirs"])
@pytest.mark.parametrize("how", ["merge", "jacobian", "gramian", "theirs"])
def test_jac_of_either_is_aggregated_by_either(made_by, how):
    problem = getattr(Problem(), made_by)()
    jacobian = problem.jacobian()
    assert torch.linalg.cond(jacobian.double()) < 30
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = reference.align(reference.gram(jacobian), third).weights @ jacobian.double()
    close(merged(problem, how), expected, 1e-5)


def test_jac_accumulates_across_packages():
    twice = Problem().ours().ours().jacobian()
    close(Problem().ours().theirs().jacobian(), twice, 1e-6)
    close(Problem().theirs().ours().jacobian(), twice, 1e-6)


def test_grad_accumulates_across_packages():
    problem = Problem().ours()
    once = merged(problem, "jacobian")
    close(merged(problem.theirs(), "merge"), 2 * once, 1e-5)


# ---- the aggregator against TorchJD's --------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 40), st.sampled_from(MODES), st.booleans())
def test_same_as_theirs(tasks, more, mode, preferred):
    matrix = rows(tasks, tasks + more, seed=more)
    preference = torch.arange(1.0, tasks + 1, dtype=torch.float64) if preferred else None
    ours, theirs = AlignedMTL(preference, mode), Theirs(preference, mode)
    close(ours(matrix), theirs(matrix), 1e-12)
    gramian = matrix @ matrix.mT
    close(ours.gramian_weighting(gramian), theirs.gramian_weighting(gramian), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_same_derivative_as_theirs(mode):
    matrix, cotangent = rows(4, 9), torch.linspace(-1, 2, 9, dtype=torch.float64)
    preference = torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
    found = []
    for kind in (AlignedMTL, Theirs):
        wanted = [matrix.clone().requires_grad_(), preference.clone().requires_grad_()]
        found.append(torch.autograd.grad(kind(wanted[1], mode)(wanted[0]), wanted, cotangent))
    for ours, theirs in zip(*found):
        close(ours, theirs, 1e-12)


def test_stands_where_theirs_stood():
    preference = torch.tensor([1.0, 2.5])
    for arguments in [(), (preference,), (None, "rmse"), (preference, "median")]:
        ours, theirs = AlignedMTL(*arguments), Theirs(*arguments)
        assert isinstance(ours, Theirs)
        assert isinstance(ours.gramian_weighting, torchjd.aggregation.AlignedMTLWeighting)
        assert (repr(ours), str(ours)) == (repr(theirs), str(theirs))
        assert ours.pref_vector is theirs.pref_vector
        assert ours.scale_mode == theirs.scale_mode
    assert repr(AlignedMTL(rtol=1e-9)) == "AlignedMTL(pref_vector=None, scale_mode='min', rtol=1e-09)"


def test_attributes_can_be_set():
    matrix = rows(3, 7)
    aggregator = AlignedMTL()
    aggregator.pref_vector, aggregator.scale_mode = torch.tensor([1.0, 0.0, 0.0]), "rmse"
    assert torch.equal(aggregator(matrix), AlignedMTL(torch.tensor([1.0, 0.0, 0.0]), "rmse")(matrix))
    for other in (copy.deepcopy(aggregator), pickle.loads(pickle.dumps(aggregator))):
        assert torch.equal(other(matrix), aggregator(matrix))


def test_runs_on_our_operations():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    called, matrix = set(), rows(3, 7, dtype=torch.float32)
    with Record():
        AlignedMTL()(matrix)
    assert {f"mtlgrad.{op}.default" for op in ("gram", "align", "combine")} <= called
    assert not {"aten.mm.default", "aten.mv.default", "aten._linalg_eigh.default"} & called


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jac_to_grad_returns_weights_and_runs_hooks(optimized, dtype):
    matrix = rows(3, 10, dtype=dtype)
    parameters = [torch.zeros(2, 2, dtype=dtype, requires_grad=True), torch.zeros(6, dtype=dtype, requires_grad=True)]
    for p, jac in zip(parameters, matrix.split([4, 6], 1)):
        p.jac = jac.reshape(3, *p.shape)
    aggregator, seen = AlignedMTL(), []
    aggregator.gramian_weighting.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    weights = jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimized)
    assert weights.dtype == dtype
    assert seen == [dtype if optimized else torch.float64]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    close(weights, Theirs().weighting(matrix), tolerance)
    close(torch.cat([p.grad.flatten() for p in parameters]), Theirs()(matrix), tolerance)


def test_autogram():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    engine = Engine(net, batch_dim=0)
    losses = net(torch.randn(3, 4)).squeeze(1)
    gradients = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])
    weights = AlignedMTLWeighting(scale_mode="median")(engine.compute_gramian(losses))
    close(weights, AlignedMTL(scale_mode="median").weighting(matrix), 1e-4)


# ---- what an aggregation of this kind must satisfy -------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 300), st.sampled_from(MODES))
def test_aligned_gradients_are_orthogonal_and_equally_long(tasks, more, mode):
    matrix = rows(tasks, tasks + more, seed=more)
    aligned = torch.stack([AlignedMTL(one, mode)(matrix) for one in torch.eye(tasks)])
    values = torch.arange(1.0, tasks + 1).double()
    length = {"min": values[0], "median": values.median(), "rmse": values.square().mean().sqrt()}[mode]
    close(aligned @ aligned.mT, length.square() * torch.eye(tasks).double(), 1e-10)
    close(aligned.mean(0), AlignedMTL(scale_mode=mode)(matrix), 1e-10)  # linear in the preference


@given(st.permutations(range(5)), st.sampled_from(MODES))
def test_order_of_tasks_does_not_matter(order, mode):
    matrix, preference = rows(5, 20), torch.tensor([0.1, 1.0, 2.0, 0.0, 5.0])
    close(AlignedMTL(preference[order], mode)(matrix[order]), AlignedMTL(preference, mode)(matrix), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_rotation_of_parameters_rotates_the_result(mode):
    matrix, rotation = rows(4, 12), torch.linalg.qr(rows(12, 12))[0]
    aggregator = AlignedMTL(scale_mode=mode)
    close(aggregator(matrix @ rotation), aggregator(matrix) @ rotation, 1e-12)


@pytest.mark.parametrize("scale", [1e-24, 1e-3, 1e18])
@pytest.mark.parametrize("mode", MODES)
def test_a_common_factor_goes_through(scale, mode):
    matrix = rows(4, 50, dtype=torch.float32)
    close(AlignedMTL(scale_mode=mode)(matrix * scale).double() / scale, AlignedMTL(scale_mode=mode)(matrix), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dependent_gradients_of_many_parameters(mode):
    # float32 sums along so many columns would miss the rank: DESIGN 7
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(3, 1 << 20, generator=generator)
    matrix[2] = matrix[0] + matrix[1]
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = reference.align(matrix.double() @ matrix.double().mT, third, mode)
    assert expected.rank == 2
    close(AlignedMTL(scale_mode=mode)(matrix), expected.weights @ matrix.double(), 1e-5)


def test_tolerance_can_be_chosen():
    matrix = torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float64))
    close(AlignedMTL()(matrix), torch.tensor([0.5, 0.0]), 1e-12)
    close(AlignedMTL(rtol=1e-12)(matrix), torch.tensor([0.5e-5, 0.5e-5]), 1e-7)
    close(Theirs()(matrix), AlignedMTL(rtol=1e-12)(matrix), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    matrix = rows(3, 100, dtype=dtype)
    found = AlignedMTL()(matrix)
    assert found.dtype == dtype
    close(found, AlignedMTL()(matrix.double()), 4 * torch.finfo(dtype).eps)


def test_nothing_to_align():
    assert torch.equal(AlignedMTL()(torch.zeros(3, 4)), torch.zeros(4))
    assert AlignedMTL()(torch.zeros(3, 0)).shape == (0,)
    assert torch.equal(AlignedMTL().weighting(torch.zeros(4, 4)), torch.full((4,), 0.25))


def test_nan_is_passed_on():
    matrix = rows(3, 7)
    matrix[1, 2] = torch.nan
    assert AlignedMTL()(matrix).isnan().all()


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AlignedMTL(scale_mode="max"), "Invalid scale_mode='max'. Expected one of min, median, rmse"),
        (lambda: AlignedMTL(torch.ones(2)), "2 rows"),
        (lambda: AlignedMTL(torch.ones(3, 1)), "pref_vector"),
        (lambda: AlignedMTL(rtol=2.0), "align: rtol: expected a number from 0 to below 1, found 2.0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()(rows(3, 7))


def test_torchjd_is_imported_by_none_but_the_module_that_needs_it():
    """And that one says so where there is none."""
    code = "import sys, mtlgrad, mtlgrad.interop; print('torchjd' in sys.modules)"
    code += "; sys.modules['torchjd'] = None; import mtlgrad.interop.torchjd"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: mtlgrad.interop.torchjd: expected the package TorchJD, found none; pip install torchjd"
    )
