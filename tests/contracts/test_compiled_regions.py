"""Where a region that torch.compile is given begins and ends changes no number: every layer, every operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mtlgrad import (
    IMTLG,
    MGDA,
    AlignedMTL,
    BayesAgg,
    Binary,
    CAGrad,
    DualProj,
    FairGrad,
    GramRule,
    Multiclass,
    NashMTL,
    PCGrad,
    Regression,
    UPGrad,
    metrics,
    ops,
)
from mtlgrad.ops.align import empty_result
from mtlgrad.traced import copies
from tests.support.adatask_cases import KINDS, RULES, begin, call, gradients, weights_of
from tests.support.bounds import near, normal, state_tensors
from tests.support.moments_cases import binary, multiclass, regression
from tests.support.nets import fill, make_adatask, several

pytestmark = [
    pytest.mark.usefixtures("one_thread", "nothing_compiled_before"),
    # Dynamo and inductor themselves use what torch deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SIZES = (6, 4, 5)  #: of batches: the first is compiled for itself, the second for all that follow
TOLERANCE = 1e-11  #: in float64

Function = Callable[..., Any]
Found = dict[str, Tensor]


@pytest.fixture
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # for regions with a backward inside
        yield
    torch.compiler.reset()


class Compiler:
    """Compiles a function as one graph, and counts what the backend was given."""

    def __init__(self, backend: str, dynamic: bool | None = None):
        self.counter, self.dynamic = CompileCounterWithBackend(backend), dynamic

    def __call__(self, function: Function) -> Function:
        compiled = torch.compile(function, fullgraph=True, backend=self.counter, dynamic=self.dynamic)
        return compiled  # type: ignore[no-any-return]


def plain(function: Function) -> Function:
    return function


def assert_same(found: Sequence[Found], expected: Sequence[Found]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        wrong = [name for name, value in other.items() if value.numel() and not near(one[name], value, TOLERANCE)]
        assert not wrong, f"step {step}: {wrong}"


# ---- the methods, stage after stage ----------------------------------------------------------------------------------

STAGES = ("backbone", "layer", "heads", "losses", "total", "backward")


def untraceable(gram: Tensor) -> Tensor:
    return torch.tensor([1.0 / math.sqrt(entry) for entry in gram.diagonal().tolist()])


METHODS: dict[str, Function] = {
    "aligned min": lambda heads: AlignedMTL(3, scale="min"),
    "aligned median": lambda heads: AlignedMTL(3, scale="median"),
    "aligned rmse": lambda heads: AlignedMTL(3, scale="rmse"),
    "upgrad": lambda heads: UPGrad(3),
    "dualproj": lambda heads: DualProj(3),
    "mgda": lambda heads: MGDA(3),
    "cagrad": lambda heads: CAGrad(3),
    "nash": lambda heads: NashMTL(3),
    "fairgrad": lambda heads: FairGrad(3),
    "imtlg": lambda heads: IMTLG(3),
    "pcgrad": lambda heads: PCGrad(3),
    "a weighting of one's own": lambda heads: GramRule(3, untraceable),
    "bayesagg": BayesAgg,
    "bayesagg without its total": BayesAgg,
}
OWN_STAGES = {"aligned rmse": {"layer"}, "bayesagg": {"layer", "total"}}  #: of one of each layer
LAYERS = list(OWN_STAGES)


class Data(NamedTuple):
    x: Tensor
    y: list[Tensor]  #: a value, two marks and one of three classes


def batch(seed: int, size: int) -> Data:
    x = normal(seed, size, 4)
    return Data(x, [x[:, :1] * 2, (x[:, 1:3] > 0.0).double(), (x[:, 3] > 0.3).long() + (x[:, 0] > 0.0).long()])


class Net:
    """A backbone, a method's layer and three heads; each stage takes what the one before it gave."""

    def __init__(self, method: str):
        self.method = method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
            self.tops = nn.ModuleList(nn.Linear(5, outputs) for outputs in (1, 2, 3)).double()
        kinds = (Regression, Binary, Multiclass)
        self.own = METHODS[method]([kind(top) for kind, top in zip(kinds, self.tops)])
        self.refreshes = isinstance(self.own, BayesAgg)

    def backbone(self, x: Tensor, y: list[Tensor]) -> Tensor:
        return self.trunk(x)  # type: ignore[no-any-return]

    def layer(self, features: Tensor, y: list[Tensor]) -> list[Tensor]:
        return [self.own(features, y)] * 3 if self.refreshes else list(self.own(features))

    def heads(self, views: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        return [top(view) for top, view in zip(self.tops, views)]

    def losses(self, outputs: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        value, marks, kind = outputs
        return [
            (value - y[0]).square().sum(1).mean(),
            (nn.functional.softplus(marks) - marks * y[1]).sum(1).mean(),
            (kind.logsumexp(1) - kind.gather(1, y[2][:, None])[:, 0]).mean(),
        ]

    def total(self, losses: list[Tensor], y: list[Tensor]) -> Tensor:
        return self.own.total(losses) if self.method == "bayesagg" else torch.stack(losses).sum()

    def backward(self, total: Tensor, y: list[Tensor]) -> list[Tensor]:
        (2.5 * total).backward()  # as a loss scale
        shown = [self.own.weights, self.own.rank] if isinstance(self.own, AlignedMTL) else []
        return [total.detach(), *shown]

    def train(self, step: Callable[[Data], Sequence[Tensor]], sizes: Sequence[int] = SIZES) -> list[Found]:
        """What each step returns and leaves behind. BayesAgg's first pass over the sizes is its warm-up."""
        steps, parameters = [], [*self.trunk.parameters(), *self.tops.parameters()]
        for i, size in enumerate([*sizes, *sizes] if self.refreshes else sizes):
            if self.refreshes and i == len(sizes):
                self.own.refresh()
            for p in parameters:
                p.grad = None
            results = step(batch(i, size))
            found: dict[str, Any] = {f"result {j}": result for j, result in enumerate(results)}
            found.update({f"gradient {j}": p.grad for j, p in enumerate(parameters)})
            shown = ("task_weights", "gradient_variance") if self.refreshes else ("weights", "singular_values", "rank")
            found.update({name: getattr(self.own, name, None) for name in shown})
            steps.append({name: value for name, value in found.items() if value is not None})
        return steps


def train(method: str, region: tuple[int, int], compiler: Function, sizes: Sequence[int] = SIZES) -> list[Found]:
    """With the stages from one to another as one region."""
    net = Net(method)

    def part(stages: Sequence[str]) -> Function:
        def run(value: Any, y: list[Tensor]) -> Any:
            for stage in stages:
                value = getattr(net, stage)(value, y)
            return value

        return run

    first, last = region[0], region[1] + 1
    before, middle, after = part(STAGES[:first]), compiler(part(STAGES[first:last])), part(STAGES[last:])
    return net.train(lambda data: after(middle(before(*data), data.y), data.y), sizes)


def named(region: tuple[int, int]) -> str:
    return " to ".join(dict.fromkeys(STAGES[i] for i in region))


def with_own_stages() -> Iterator[Any]:
    for method in LAYERS:
        for first in range(5):
            for last in range(first, 6 if first == 0 else 5):
                if first == 0 or OWN_STAGES[method].intersection(STAGES[first : last + 1]):
                    yield pytest.param(method, (first, last), id=f"{method}, {named((first, last))}")


@pytest.mark.parametrize(("method", "region"), list(with_own_stages()))
def test_every_region(method: str, region: tuple[int, int]) -> None:
    compiler = Compiler("aot_eager")
    assert_same(train(method, region, compiler), train(method, region, plain))
    # One graph for the first size and one for the others, where Dynamo may have to begin again; none for a refresh.
    assert 2 <= compiler.counter.frame_count <= 3


@pytest.mark.parametrize("end", range(6), ids=STAGES)
@pytest.mark.parametrize("method", LAYERS)
def test_every_end_under_inductor(method: str, end: int) -> None:
    compiler = Compiler("inductor", dynamic=True)
    assert_same(train(method, (0, end), compiler, SIZES[:2]), train(method, (0, end), plain, SIZES[:2]))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in LAYERS])
def test_every_method(method: str) -> None:
    assert_same(train(method, (0, 1), Compiler("aot_eager")), train(method, (0, 1), plain))


@pytest.mark.parametrize("end", ["layer", "total"])
@pytest.mark.parametrize("method", LAYERS)
def test_every_layer_under_dynamo_alone(method: str, end: str) -> None:
    region = (0, STAGES.index(end))
    assert_same(train(method, region, Compiler("eager")), train(method, region, plain))


# ---- what else a region does with a layer's outputs, and returns beside them -----------------------------------------


class Form(NamedTuple):
    """A region, and the total from what it returned. The plain net does the third, if there is one: it may not do the
    first."""

    region: Callable[[Net, Data], Sequence[Tensor]]
    rest: Callable[[Net, Sequence[Tensor], list[Tensor]], Tensor]
    plain: Callable[[Net, Data], Sequence[Tensor]] | None = None


def total_of(net: Net, views: Any, y: list[Tensor]) -> Any:
    for stage in STAGES[2:5]:
        views = getattr(net, stage)(views, y)
    return views


def entered(net: Net, data: Data) -> tuple[Tensor, list[Tensor]]:
    features = 2.0 * net.backbone(*data)  # which the backbone's own backward does not need
    return features, net.layer(features, data.y)


def features_beside(net: Net, data: Data) -> Sequence[Tensor]:
    features, views = entered(net, data)
    return features, *views


def views_of_views(net: Net, data: Data) -> Sequence[Tensor]:
    _, views = entered(net, data)
    return *views, views[0], views[1].detach(), views[1][:2], views[2].mT


def one_of_them(net: Net, data: Data) -> Sequence[Tensor]:
    return entered(net, data)[1][1:2]


def changed_in_place(net: Net, data: Data) -> Sequence[Tensor]:
    features, views = entered(net, data)
    views[0].mul_(2.0)
    return features, *views


def changed(net: Net, data: Data) -> Sequence[Tensor]:
    features, views = entered(net, data)
    twice = views[0] * 2.0
    return features, *([twice] * 3 if net.refreshes else [twice, *views[1:]])


def features_changed_in_place(net: Net, data: Data) -> Sequence[Tensor]:
    features, views = entered(net, data)
    return features.mul_(2.0), *views


def features_changed(net: Net, data: Data) -> Sequence[Tensor]:
    features, views = entered(net, data)
    return features * 2.0, *views


def logged_total(net: Net, data: Data) -> Sequence[Tensor]:
    total = total_of(net, entered(net, data)[1], data.y)
    return total, total, total.detach(), total.view(1)


def beside(net: Net, found: Sequence[Tensor], y: list[Tensor]) -> Tensor:
    return total_of(net, found[1:], y) + found[0].square().sum()


FORMS: dict[str, Form] = {
    "features beside": Form(features_beside, beside),
    "views of views": Form(
        views_of_views, lambda net, found, y: total_of(net, found[:3], y) + found[3].sum() + found[6].square().sum()
    ),
    "one of them": Form(
        one_of_them, lambda net, found, y: total_of(net, [found[0], found[0].detach(), found[0].detach()], y)
    ),
    "views changed in place": Form(changed_in_place, beside, changed),
    "features changed in place": Form(features_changed_in_place, beside, features_changed),
    "logged total": Form(logged_total, lambda net, found, y: found[0] + found[1] + found[3].sum()),
}


def run(method: str, form: Form, region: Function, compiler: Function) -> list[Found]:
    net = Net(method)
    compiled = compiler(lambda x, y: region(net, Data(x, y)))

    def step(data: Data) -> Sequence[Tensor]:
        found = compiled(*data)
        form.rest(net, found, data.y).backward()
        return [result.detach() for result in found]

    return net.train(step, SIZES[:1] * 2)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("method", LAYERS)
def test_more_than_the_views(method: str, form: str) -> None:
    chosen = FORMS[form]
    found = run(method, chosen, chosen.region, Compiler("aot_eager"))
    assert_same(found, run(method, chosen, chosen.plain or chosen.region, plain))
    if chosen.plain is not None:
        with pytest.raises(RuntimeError, match="modified inplace"):
            run(method, chosen, chosen.region, plain)


@pytest.mark.parametrize("method", LAYERS)
def test_more_than_the_views_under_inductor(method: str) -> None:
    def region(net: Net, data: Data) -> Sequence[Tensor]:
        return *features_beside(net, data), *logged_total(net, data), *views_of_views(net, data)

    def rest(net: Net, found: Sequence[Tensor], y: list[Tensor]) -> Tensor:
        parts = [FORMS[form].rest for form in ("features beside", "logged total", "views of views")]
        return sum(part(net, found[i:j], y) for part, i, j in zip(parts, (0, 4, 8), (4, 8, None)))  # type: ignore[return-value]

    form = Form(region, rest)
    assert_same(run(method, form, region, Compiler("inductor")), run(method, form, region, plain))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("method", LAYERS)
def test_without_gradients(method: str, backend: str) -> None:
    """Views, or the features themselves, are right here: what is done to one is done to all, inside and outside."""

    def region(net: Net, features: Tensor, data: Data) -> Sequence[Tensor]:
        with torch.no_grad():
            made = net.backbone(*data)
            one, other = net.layer(made, data.y), net.layer(features, data.y)
            one[0].add_(1.0)
            other[1].mul_(3.0)
        return made, *one, *other

    found = []
    for compiler in (Compiler(backend), plain):
        net, data = Net(method), batch(0, 6)
        features = normal(1, 6, 5)
        results = compiler(lambda *given, net=net: region(net, given[0], Data(*given[1:])))(features, *data)
        results[1].sub_(0.5)
        results[5].sub_(0.5)
        found.append({str(i): result for i, result in enumerate([features, *results])})
        gradient = torch.autograd.grad(total_of(net, net.layer(features, data.y), data.y), net.tops.parameters())
        found[-1].update({f"gradient {i}": g for i, g in enumerate(gradient)})
    assert_same(found[:1], found[1:])


# ---- what is kept between forward and backward, and from step to step ------------------------------------------------


@pytest.mark.parametrize(
    ("regions", "backend"),
    [([(0, 4)], "inductor"), ([(0, 1), (2, 4)], "aot_eager"), ([(4, 4)], "inductor")],
    ids=["all", "layer and total apart", "total"],
)
def test_several_passes_before_their_backwards(regions: list[tuple[int, int]], backend: str) -> None:
    """Each total remembers its own pass."""

    def passes(compiler: Function) -> list[Found]:
        net = Net("bayesagg")
        ends = dict(regions)
        stages: list[Function] = []
        first = 0
        while first < 5:
            last = ends.get(first, first)

            def part(value: Any, y: list[Tensor], names: Sequence[str] = STAGES[first : last + 1]) -> Any:
                for name in names:
                    value = getattr(net, name)(value, y)
                return value

            stages.append(compiler(part) if first in ends else part)
            first = last + 1

        def forward(data: Data) -> Tensor:
            value: Any = data.x
            for stage in stages:
                value = stage(value, data.y)
            return value  # type: ignore[no-any-return]

        net.layer(net.backbone(*batch(0, 6)), batch(0, 6).y)
        net.own.refresh()
        totals = [factor * forward(batch(i, 6)) for i, factor in enumerate((8.0, 0.5, 3.0))]
        parameters = list(net.trunk.parameters())
        gradients = [torch.autograd.grad(totals[i], parameters) for i in (1, 0, 2)]
        return [{str(i): g for i, g in enumerate(step)} for step in gradients]

    assert_same(passes(Compiler(backend)), passes(plain))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_that_are_looked_at_in_a_region(backend: str) -> None:
    """The next step writes where the layer has its own: what was returned stays."""

    def steps(compiler: Function) -> list[Found]:
        aligned = AlignedMTL(2)

        def step(x: Tensor, w: Tensor) -> Sequence[Tensor]:
            features = x * w
            losses = [features.square().sum(), (features * 0.3).cos().sum()]
            weights = aligned.weigh(losses, features)
            return weights, aligned.weights, aligned.rank, (weights * torch.stack(losses)).sum()  # type: ignore[return-value]

        compiled, w = compiler(step), normal(0, 4).requires_grad_()
        results = [compiled(normal(i, 6, 4), w) for i in range(3)]
        return [
            {"gradient": torch.autograd.grad(total, w)[0], **{str(i): v.detach() for i, v in enumerate(shown)}}
            for *shown, total in results
        ]

    assert_same(steps(Compiler(backend)), steps(plain))


# ---- operations ------------------------------------------------------------------------------------------------------


def moments_of(function: Function, case: Any, **options: Any) -> tuple[list[Tensor], Function]:
    tensors = [
        case.features,
        case.mean,
        *(case.covariance if isinstance(case.covariance, tuple) else [case.covariance]),
    ]

    def called(features: Tensor, mean: Tensor, *covariance: Tensor) -> Any:
        structured = covariance if len(covariance) == 2 else covariance[0]
        return function(features, case.targets, mean, structured, **options)

    return tensors, called


def listed(rows: Sequence[Tensor], count: int = 3) -> list[list[Tensor]]:
    """Rows of several tensors each."""
    each = len(rows) // count
    return [list(rows[t * each : (t + 1) * each]) for t in range(count)]


def operations(size: int) -> dict[str, tuple[list[Tensor], Function]]:
    """Tensors that may have a gradient, and a function of them."""
    rows, weights, vector, matrix = normal(1, 3, size), normal(2, 3), normal(3, size), normal(4, 3, 2, size)
    parts = [normal(10 + i, *shape) for i, shape in enumerate([(size,), (2, size)] * 3)]
    samples, means, variances = normal(5, 7, 3, 5), normal(6, size, 3, 4), normal(7, size, 3, 4).square() + 0.1
    cases = binary(1, size, 4), multiclass(2, size, 4), multiclass(2, size, 4, structure="kron")
    return {
        "gram": ([rows, matrix], lambda *r: ops.gram(ops.Stacked(r))),
        "combine": ([weights, rows], lambda w, r: ops.combine(r, w)),
        "combine lists": ([weights, *parts], lambda w, *p: ops.combine(listed(p), w)),
        "displace": ([weights, vector, *parts[::2]], lambda w, b, *r: ops.displace(b, r, w)),
        "displace lists": ([weights, *parts], lambda w, *p: ops.displace(p[:2], listed(p[2:], 2), w[:2])),
        "regression moments": moments_of(ops.regression_moments, regression(0, size, 4)),
        "binary moments": moments_of(ops.binary_moments, cases[0]),
        "multiclass moments": moments_of(ops.multiclass_moments, cases[1]),
        "multiclass moments, kron": moments_of(ops.multiclass_moments, cases[2]),
        "dots": ([rows, vector], lambda r, v: ops.dots(r, v)),
        "sampled moments": (
            [cases[1].features, samples],
            lambda h, w: ops.sampled_moments(h, cases[1].targets, w, kind="multiclass"),
        ),
        "precision mean": ([means, variances], lambda e, v: ops.precision_mean(e, v, [0.3, 1.0, 0.5])),
    }


def tensors_in(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors_in(part)]


def ends_at_it(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    return tensors_in(function(*tensors))


def within(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Its arguments made in the region, and returned, with views of its results."""
    made = [2.0 * tensor for tensor in tensors]
    results = tensors_in(function(*made))
    return [*made, *results, *results, *(result.detach() for result in results), *(r.flatten()[1:] for r in results)]


def goes_on(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [result.cos().sum() for result in tensors_in(function(*[2.0 * tensor for tensor in tensors]))]


@pytest.mark.parametrize("region", [ends_at_it, within, goes_on])
@pytest.mark.parametrize("name", list(operations(1)))
def test_every_operation(name: str, region: Function) -> None:
    def steps(compiler: Function) -> list[Found]:
        found = []
        targets = {}

        def compute(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
            return region(targets[size][1], tensors)  # type: ignore[no-any-return]

        compiled = compiler(compute)
        for size in SIZES:
            targets[size] = operations(size)[name]
            leaves = [tensor.requires_grad_() for tensor in targets[size][0]]
            results = compiled(leaves, size)
            loss = sum(result.square().sum() for result in results if result.requires_grad)
            gradients = torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]
            found.append({str(i): t.detach() for i, t in enumerate([*results, *gradients])})
        return found

    assert_same(steps(Compiler("aot_eager")), steps(plain))


# ---- out= and result=: arguments, parts of them, what the region made ------------------------------------------------


def new_result() -> ops.AlignResult:
    return empty_result(3, torch.device("cpu"))


def align_twice(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    result = ops.align(rows @ rows.mT, out=new_result())
    first = result.weights * 2.0
    return [first, *ops.align(rows.exp() @ rows.mT.exp(), out=result)]


def merge_to_parts(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    result = new_result()
    row, _ = ops.merge(2.0 * rows, out=buffer[1], result=result)
    column, own = ops.merge(rows[:, :4].contiguous(), out=buffer[:, 2])
    piece, _ = ops.merge(rows[:, 1:5].cos(), out=buffer[3, 1:5], result=result)
    return [row, column, piece, buffer.sum(), 3.0 * buffer, *own, *result]  # type: ignore[list-item]


def combine_to_parts(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    made, own = buffer.sin(), [rows[0] * 1.5, rows[1] * 2.0, rows[2] + 1.0]
    ops.combine(rows, weights, out=buffer[2])
    ops.combine(rows[:, :4], weights, out=made[:, 3])
    ops.combine(rows, weights, out=made[0])
    ops.combine(own, weights, out=own[1])
    return [buffer * 1.0, made, made.square(), *own]


def displace_to_parts(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    made = buffer.sin()
    parts = [made[1, 1:4], made[2, 1:4]]
    ops.displace(buffer[0], rows, weights, out=buffer[0])
    ops.displace(parts, ops.Stacked([rows[:, :3].contiguous(), rows[:, 2:5]]), weights, out=parts)
    ops.displace(made[3], rows, weights, out=made[0])
    return [*parts, made, buffer + 1.0]


WRITERS: list[Function] = [align_twice, merge_to_parts, combine_to_parts, displace_to_parts]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("writer", WRITERS)
def test_results_that_are_written_to(writer: Function, backend: str) -> None:
    def steps(compiler: Function) -> list[Found]:
        compiled, found = compiler(writer), []
        for seed, size in enumerate((7, 5, 6)):
            given = [normal(3 * seed, 3, size), normal(3 * seed + 1, 4, size), normal(3 * seed + 2, 3)]
            results = compiled(*given)
            found.append({str(i): t.clone() for i, t in enumerate([*results, *given])})
        return found

    assert_same(steps(Compiler(backend)), steps(plain))


def test_gradient_statistics() -> None:
    def steps(compiler: Function) -> list[Found]:
        weights = torch.linspace(1.0, 2.0, 3)
        compiled = compiler(lambda rows: (*metrics.gradient_statistics(2.0 * rows, weights), rows))
        return [{str(i): t for i, t in enumerate(compiled(normal(0, 3, size)))} for size in SIZES]

    assert_same(steps(Compiler("aot_eager")), steps(plain))


@pytest.mark.parametrize("rule", KINDS)
def test_parameters_that_are_moved(rule: str) -> None:
    """By AdaTask's operations, as a region's last work; what it returns of them is what they became."""

    def steps(compiler: Function) -> list[Found]:
        state = begin(RULES[rule], [(4, 5), (3,)], 3, [(torch.float64, torch.float64)])

        def step(jacobians: list[Tensor]) -> Sequence[Tensor]:
            before = [2.0 * p for p in state.parameters]
            call(ops, RULES[rule], state, [2.0 * jacobian for jacobian in jacobians], task_weights=weights_of(3))
            return *before, *state.parameters, *(p[0] for p in state.parameters)

        compiled, found = compiler(step), []
        for seed in range(3):
            returned = [tensor.clone() for tensor in compiled(gradients(state, 3, seed))]
            found.append({str(i): t for i, t in enumerate(returned)})
            found[-1].update({name: tensor.clone() for name, tensor in state.named().items()})
        return found

    assert_same(steps(Compiler("aot_eager")), steps(plain))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_of_views(dynamic: bool) -> None:
    """A row of a block lies at an offset, which inductor loses if it depends on a dynamic size: then it is refused."""

    def step(block: Tensor, jacobian: Tensor, counts: Tensor) -> Tensor:
        ops.adatask_adagrad([block[1]], [jacobian], [[block[2], block[3]]], [counts], lr=0.1)
        return 2.0 * block

    def given() -> list[Tensor]:
        return [normal(0, 4, 5).abs() + 1.0, normal(1, 2, 5), torch.zeros(2)]

    own, expected, compiled = given(), given(), Compiler("inductor", dynamic=dynamic)(step)
    if dynamic:
        with pytest.raises(
            torch._dynamo.exc.TorchDynamoException, match="adatask_adagrad: expected to change tensors at"
        ):
            compiled(*own)
    else:
        found = [compiled(*own), *own]
        assert_same(
            [{str(i): t for i, t in enumerate(found)}],
            [{str(i): t for i, t in enumerate([step(*expected), *expected])}],
        )


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adagrad"])
def test_an_optimizers_step(name: str) -> None:
    """Dynamo leaves the graph in it, and goes on."""

    def steps(compiler: Function) -> list[Found]:
        parameters = several(torch.float64, [(3, 4), (7,)])
        optimizer = make_adatask(name, parameters, lr=0.1, weight_decay=0.1)
        compiled = compiler(lambda: optimizer.step())
        found = []
        for seed in range(3):
            fill(parameters, seed)
            compiled()
            found.append({str(i): p.detach().clone() for i, p in enumerate(parameters)})
            found[-1].update(state_tensors(optimizer))
        return found

    assert_same(steps(lambda step: torch.compile(step, backend="aot_eager")), steps(plain))


def test_copies_are_an_operator() -> None:
    tensors = [normal(0, 3, 4).mT, torch.tensor(2), torch.zeros(0)]
    torch.library.opcheck(torch.ops.mtlgrad.copies.default, (tensors,))
    found = copies(tensors)
    for copy, tensor in zip(found, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert not copy.numel() or copy.data_ptr() != tensor.data_ptr()
