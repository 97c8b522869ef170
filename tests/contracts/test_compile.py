"""torch.compile around, inside and through every method: the same numbers wherever a region begins and ends, few
graphs."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import mtlgrad
from mtlgrad import AlignedMTL, BayesAgg, Binary, CAGrad, FairGrad, GramRule, Multiclass, Regression, metrics
from mtlgrad.bayesagg import layer as passes
from mtlgrad.traced import copies
from tests.support.bounds import contents, near, normal, state_tensors
from tests.support.nets import METHODS, Batch, Case, Model, batch, epoch, fill, make_adatask, several, unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh"),
    # Dynamo and inductor themselves use what torch deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
slow = pytest.mark.slow
SIZES = (6, 4, 5)  #: of batches: the first is compiled for itself, the second for all that follow

Function = Callable[..., Any]
Found = dict[str, Tensor]


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # for regions with a backward inside
        yield
    torch.compiler.reset()


class Compiler:
    """Counts what the backend was given."""

    def __init__(self, backend: str, dynamic: bool | None = None, fullgraph: bool = True):
        self.counter = CompileCounterWithBackend(backend)
        self.options: Any = {"backend": self.counter, "dynamic": dynamic, "fullgraph": fullgraph}

    def __call__(self, function: Function) -> Function:
        return torch.compile(function, **self.options)  # type: ignore[no-any-return]


def plain(function: Function) -> Function:
    return function


def assert_same(found: Sequence[Found], expected: Sequence[Found], tolerance: float = 1e-11) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        wrong = [name for name, value in other.items() if value.numel() and not near(one[name], value, tolerance)]
        assert not wrong, f"step {step}: {wrong}"


# ---- backbone and heads, the method outside --------------------------------------------------------------------------


def trained(method: str, compiler: Function, heads: bool = True, steps: int = 6) -> Found:
    trainer = METHODS[method](Model())  # BayesAgg is given the plain heads, that have the weights
    model = trainer.model
    model.backbone = compiler(model.backbone)
    if heads:
        model.heads = nn.ModuleList(compiler(head) for head in model.heads)
    shown = [loss for i in range(steps) for loss in trainer.step(batch(seed=i))]
    return {str(i): value.detach() for i, value in enumerate([*shown, *model.parameters()])}


def rounds(method: str, compiler: Function) -> Found:
    """Of alphaVIL. The compiled model handed over; a compiled one in the loss of a plain one; compiled in place."""
    case = Case(tasks=["size", "kind"], dtype=torch.float64, norm=True)
    model = case.model
    if method == "alphavil model":
        case.model = compiler(model)
    elif method == "alphavil loss":
        called = compiler(model)
        case.change("size", loss=lambda m, b: (m.heads["size"](called(b.x)).squeeze(1) - b.y).square().mean())
    elif isinstance(compiler, Compiler):
        model.compile(**compiler.options)
    vil = case.vil(alpha_epochs=1)
    for number in range(2):
        torch.manual_seed(number)
        assert epoch(vil).kept == "search"
    return contents(model)


@pytest.mark.parametrize(
    "method",
    [
        "aligned layer",
        pytest.param("aligned weigh", marks=slow),
        "bayesagg",
        "adatask adam",
        "alphavil model",
        pytest.param("alphavil loss", marks=slow),
        pytest.param("alphavil in place", marks=slow),
    ],
)
def test_backbone_and_heads(method: str) -> None:
    """Each compiled once. AdaTask's optimizers are outside, so one stands for all. Parameters that others stand in for,
    as alphaVIL's, do not have the model compiled over and over."""
    is_vil = method.startswith("alphavil")
    train, compiler = rounds if is_vil else trained, Compiler("aot_eager", fullgraph=not is_vil)
    with torch._functorch.config.patch(donated_buffer=False):  # what a backward may free early, and T backwards need
        assert_same([train(method, compiler)], [train(method, plain)], 1e-12 if is_vil else 1e-5)
    assert compiler.counter.frame_count in (range(1, 9) if is_vil else [4])


@slow
@pytest.mark.parametrize("method", ["adatask rmsprop", "aligned merge"])
def test_inductors_backward_runs_once_a_task(method: str) -> None:
    with torch._functorch.config.patch(donated_buffer=False):
        found = trained(method, Compiler("inductor"), heads=False, steps=4)
    assert_same([found], [trained(method, plain, steps=4)], 1e-5)


def test_buffers_that_a_compiled_backward_gives_away() -> None:
    """torch's default for whoever makes one backward: several are refused in torch's words, nothing has changed, and
    the message names the setting that helps. One backward, of the layer, needs no setting."""
    model, data = Model(), batch()
    backbone, aligned = torch.compile(model.backbone, backend="aot_eager"), AlignedMTL(3)
    with torch._functorch.config.patch(donated_buffer=True):
        torch.stack(model.losses(aligned(backbone(data.x)), data.y)).sum().backward()
        before = [copy.deepcopy(p.grad) for p in model.parameters()]
        features = backbone(data.x)
        with pytest.raises(RuntimeError, match=r"retain_graph=False.*config\.donated_buffer=False"):
            mtlgrad.task_backward(model.losses(features, data.y), model.shared, features=features)
    assert not any(hasattr(p, "jac") for p in model.shared)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)


def test_features_out_of_the_graph_of_the_losses() -> None:
    """They are its outputs side by side, so that no loss depends on them: said, not taken for a zero gradient."""
    model, data = Model(), batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(data: Batch) -> tuple[Tensor, list[Tensor]]:
        features = model.backbone(data.x)
        return features, model.losses(features, data.y)

    features, losses = forward(data)
    with pytest.raises(ValueError, match=r"task_backward: features: expected .* leave features out"):
        mtlgrad.task_backward(losses, model.shared, features=features)
    with pytest.raises(ValueError, match=r"AlignedMTL\.weigh: shared: expected"):
        AlignedMTL(3).weigh(losses, features)
    assert int((AlignedMTL(3).weigh(losses, model.shared) != 1.0).sum()) == 3


# ---- layers, stage after stage ---------------------------------------------------------------------------------------

STAGES = ("backbone", "layer", "heads", "losses", "total", "backward")
ALL = (0, 4)


def untraceable(gram: Tensor) -> Tensor:
    return torch.tensor([1.0 / math.sqrt(entry) for entry in gram.diagonal().tolist()])


RULES = ("UPGrad", "DualProj", "MGDA", "CAGrad", "NashMTL", "FairGrad", "IMTLG", "PCGrad")
OWN: dict[str, Function] = {
    "aligned": lambda heads: AlignedMTL(3, scale="rmse"),
    "bayesagg": BayesAgg,
    "bayesagg without its total": BayesAgg,
    "aligned min": lambda heads: AlignedMTL(3, scale="min"),
    "aligned median": lambda heads: AlignedMTL(3, scale="median"),
    **{rule: lambda heads, rule=rule: getattr(mtlgrad, rule)(3) for rule in RULES},
    "a weighting of one's own": lambda heads: GramRule(3, untraceable),
}
OWN_STAGES = {"aligned": {"layer"}, "bayesagg": {"layer", "total"}}
LAYERS = list(OWN_STAGES)
each_layer = pytest.mark.parametrize("method", LAYERS)


class Data(NamedTuple):
    x: Tensor
    y: list[Tensor]  #: a value, two marks and one of three classes; some are missing


def made(seed: int, size: int) -> Data:
    x = normal(seed, size, 6)
    y = [x[:, :1] * 2, (x[:, 1:3] > 0.0).double(), (x[:, 3] > 0.3).long() + (x[:, 0] > 0.0).long()]
    y[0][-1], y[1][0, 1], y[2][1] = torch.nan, torch.nan, -100
    return Data(x, y)


class Net:
    """A backbone, a method's layer and three heads; each stage takes what the one before it gave."""

    def __init__(self, method: str, dtype: torch.dtype = torch.float64, **options: Any):
        self.method, self.dtype = method, dtype
        self.model = Model(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh()), width=5).to(dtype)
        torch.manual_seed(0)
        self.own = OWN[method]([k(h) for k, h in zip((Regression, Binary, Multiclass), self.model.heads)], **options)  # type: ignore[arg-type]
        self.enter, self.add = self.own, getattr(self.own, "total", None)
        self.is_bayes = isinstance(self.own, BayesAgg)

    def backbone(self, x: Tensor, y: list[Tensor]) -> Tensor:
        return self.model.backbone(x)  # type: ignore[no-any-return]

    def layer(self, features: Tensor, y: list[Tensor]) -> list[Tensor]:
        return [self.enter(features, y)] * 3 if self.is_bayes else list(self.enter(features))

    def heads(self, views: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        return [head(view).to(self.dtype) for head, view in zip(self.model.heads, views)]

    def losses(self, outputs: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        """Without looking at which labels are missing: shapes that depend on data cannot be compiled."""
        (value, marks, kind), known = outputs, [t.nan_to_num() for t in y[:2]]
        return [
            ((value - known[0]) * ~y[0].isnan()).square().sum(1).mean(),
            ((F.softplus(marks) - marks * known[1]) * ~y[1].isnan()).sum(1).mean(),
            F.cross_entropy(kind, y[2], ignore_index=-100, reduction="sum") / len(kind),
        ]

    def total(self, losses: list[Tensor], y: list[Tensor]) -> Tensor:
        return self.add(losses) if self.method == "bayesagg" and self.add else torch.stack(losses).sum()

    def backward(self, total: Tensor, y: list[Tensor]) -> list[Tensor]:
        (2.5 * total).backward()  # as a loss scale
        shown = [self.own.weights, self.own.rank] if isinstance(self.own, AlignedMTL) else []
        return [total.detach(), *shown]

    def train(self, step: Callable[[Data], Sequence[Tensor]], sizes: Sequence[int] = SIZES) -> list[Found]:
        """What each step returns and leaves behind. BayesAgg's first pass over the sizes is its warm-up."""
        steps = []
        for i, size in enumerate([*sizes, *sizes] if self.is_bayes else sizes):
            if self.is_bayes and i == len(sizes):
                self.own.refresh()
            self.model.zero_grad()
            x, y = made(i, size)
            results = step(Data(x.to(self.dtype), [t.to(self.dtype) if t.is_floating_point() else t for t in y]))
            found: dict[str, Any] = {f"result {j}": result for j, result in enumerate(results)}
            found.update({f"gradient {name}": p.grad for name, p in self.model.named_parameters()})
            shown = ("task_weights", "gradient_variance") if self.is_bayes else ("weights", "singular_values", "rank")
            found.update({name: getattr(self.own, name, None) for name in shown})
            steps.append({name: value for name, value in found.items() if value is not None})
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= 0.02 * p.grad  # type: ignore[operator]
        return steps


def part(net: Net, first: int, last: int) -> Function:
    def run(value: Any, y: list[Tensor]) -> Any:
        for stage in STAGES[first : last + 1]:
            value = getattr(net, stage)(value, y)
        return value

    return run


def train(net: Net, region: tuple[int, int], compiler: Function = plain, sizes: Sequence[int] = SIZES) -> list[Found]:
    """With the stages from one to another as one region."""
    first, last = region
    before, middle, after = part(net, 0, first - 1), compiler(part(net, first, last)), part(net, last + 1, 5)
    return net.train(lambda data: after(middle(before(*data), data.y), data.y), sizes)


#: In the quick tests: it ends at the layer, or begins there; the total alone.
QUICK = {(0, 1), (1, 4), (4, 4)}


def regions() -> Iterator[Any]:
    for method in LAYERS:
        for first in range(5):
            for last in range(first, 6 if first == 0 else 5):
                if first == 0 or OWN_STAGES[method].intersection(STAGES[first : last + 1]):
                    name = " to ".join(dict.fromkeys((STAGES[first], STAGES[last])))
                    marks = () if (first, last) in QUICK else slow
                    yield pytest.param(method, (first, last), id=f"{method}, {name}", marks=marks)


@pytest.mark.parametrize(("method", "region"), list(regions()))
def test_every_region(method: str, region: tuple[int, int]) -> None:
    compiler = Compiler("aot_eager")
    assert_same(train(Net(method), region, compiler), train(Net(method), region))
    # One graph for the first size and one for the others, where Dynamo may have to begin again; none for a refresh.
    assert 2 <= compiler.counter.frame_count <= 3


@slow
@each_layer
def test_a_backward_inside_under_inductor(method: str) -> None:
    """Regions that end before: `test_inductor`."""
    region = (0, STAGES.index("backward"))
    found = train(Net(method), region, Compiler("inductor", dynamic=True), SIZES[:2])
    assert_same(found, train(Net(method), region, sizes=SIZES[:2]))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[slow] * (method in RULES[1:] or method == "aligned median"))
        for method in OWN
        if method not in LAYERS
    ],
)
def test_every_other_layer(method: str) -> None:
    assert_same(train(Net(method), (0, 1), Compiler("aot_eager")), train(Net(method), (0, 1)))


@slow
@pytest.mark.parametrize("end", ["layer", "total"])
@each_layer
def test_every_layer_under_dynamo_alone(method: str, end: str) -> None:
    region = (0, STAGES.index(end))
    assert_same(train(Net(method), region, Compiler("eager")), train(Net(method), region))


@slow
@pytest.mark.parametrize(
    "options",
    [{"statistics": "streaming", "covariance": "kron"}, {"moments": "sampled", "num_samples": 16}],
    ids=["streaming", "sampled"],
)
def test_options_of_bayesagg(options: dict[str, Any]) -> None:
    compiler = Compiler("aot_eager")
    found = train(Net("bayesagg", **options), ALL, compiler)
    assert_same(found, train(Net("bayesagg", **options), ALL), 0.0)
    assert compiler.counter.frame_count == 2


@pytest.mark.parametrize(
    ("method", "sizes"), [("aligned", (6, 6, 6, 6)), pytest.param("bayesagg", SIZES, marks=slow)], ids=LAYERS
)
def test_the_whole_step_under_autocast(method: str, sizes: Sequence[int]) -> None:
    """Losses in bfloat16 and backward, the layer inside; only the optimizer is outside."""

    def run(compiler: Function) -> list[Found]:
        net = Net(method, torch.float32)

        def step(x: Tensor, y: list[Tensor]) -> Sequence[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                total = part(net, *ALL)(x, y)
            return net.backward(total, y)

        compiled = compiler(step)
        return net.train(lambda data: compiled(*data), sizes)

    compiler = Compiler("aot_eager")
    assert_same(run(compiler), run(plain), 0.0)
    assert compiler.counter.frame_count <= 2


@each_layer
def test_the_layer_itself(method: str) -> None:
    """Its module compiled, which was used before, and its total."""
    found = []
    for compiler in (Compiler("aot_eager"), plain):
        net = Net(method)
        train(net, ALL)
        net.enter, net.add = compiler(net.own), net.add and compiler(net.add)
        found.append(train(net, ALL))
    assert_same(*found, 0.0)


@pytest.mark.parametrize(
    ("method", "inside"),
    [("bayesagg", False), pytest.param("bayesagg", True, marks=slow), pytest.param("aligned", True, marks=slow)],
    ids=lambda value: {False: "masks", True: "backward inside"}.get(value, value),
)
def test_graph_breaks_change_no_number(method: str, inside: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Losses whose shapes depend on data, and a backward that Dynamo does not trace: it then looks at the Python that
    autograd calls, and used to crash."""

    def masked(outputs: Sequence[Tensor], y: list[Tensor]) -> list[Tensor]:
        (value, marks, kind), known = outputs, [~t.isnan() for t in y[:2]]
        return [
            (value[known[0]] - y[0][known[0]]).square().sum() / len(value),
            F.binary_cross_entropy_with_logits(marks[known[1]], y[1][known[1]], reduction="sum") / len(marks),
            F.cross_entropy(kind, y[2], reduction="sum") / len(kind),
        ]

    def run(compiler: Function) -> list[Found]:
        net: Any = Net(method)
        if not inside:
            net.losses = masked
        return train(net, (0, 5) if inside else ALL, compiler)

    with torch._dynamo.config.patch(trace_autograd_ops=False):
        assert_same(run(Compiler("aot_eager" if inside else "eager", fullgraph=False)), run(plain), 0.0)
    assert "data_ptr" not in capfd.readouterr().err


# ---- what else a region does with a layer's outputs, and returns beside them -----------------------------------------


class Form(NamedTuple):
    """What a region returns, of features, their views and a function from views to the total; and the total from that.
    The plain net does the third, if there is one: it may not do the first."""

    region: Function
    rest: Function
    plain: Function | None = None


def twice_the_first(v: Sequence[Tensor]) -> list[Tensor]:
    return [v[0] * 2.0] * 3 if v[0] is v[1] else [v[0] * 2.0, *v[1:]]


def beside(found: Sequence[Tensor], total: Function) -> Tensor:
    return total(found[1:]) + found[0].square().sum()  # type: ignore[no-any-return]


FORMS: dict[str, Form] = {
    "features beside": Form(lambda z, v, total: [z, *v], beside),
    "views of views": Form(
        lambda z, v, total: [*v, v[0], v[1].detach(), v[1][:2], v[2].mT],
        lambda found, total: total(found[:3]) + found[3].sum() + found[6].square().sum(),
    ),
    "one of them": Form(
        lambda z, v, total: v[1:2], lambda found, total: total([found[0], found[0].detach(), found[0].detach()])
    ),
    "views changed in place": Form(
        lambda z, v, total: [z, v[0].mul_(2.0), *v[1:]], beside, lambda z, v, total: [z, *twice_the_first(v)]
    ),
    "features changed in place": Form(lambda z, v, total: [z.mul_(2.0), *v], beside, lambda z, v, total: [z * 2.0, *v]),
    "logged total": Form(
        lambda z, v, total: [t := total(v), t, t.detach(), t.view(1)],
        lambda found, total: found[0] + found[1] + found[3].sum(),
    ),
}


def run(net: Net, forms: Sequence[Form], compiler: Function, sizes: Sequence[int] = SIZES[:1] * 2) -> list[Found]:
    """One after the other in one region, where features and targets are made."""

    def total(y: list[Tensor]) -> Function:
        return lambda views: part(net, 2, 4)(views, y)

    def region(x: Tensor, y: list[Tensor]) -> list[Sequence[Tensor]]:
        found, y = [], [y[0] * 2 + 1, *y[1:]]
        for form in forms:
            features = 2.0 * net.backbone(x, y)  # which the backbone's own backward does not need
            found.append(form.region(features, net.layer(features, y), total(y)))
        return found

    compiled = compiler(region)

    def step(data: Data) -> Sequence[Tensor]:
        found = compiled(*data)
        torch.stack([form.rest(some, total(data.y)) for form, some in zip(forms, found)]).sum().backward()
        return [result.detach() for some in found for result in some]

    return net.train(step, sizes)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, id=name, marks=[slow] * (name not in ("features beside", "logged total")))
        for name, form in FORMS.items()
    ],
)
@each_layer
def test_more_than_the_views(method: str, form: Form) -> None:
    instead = form._replace(region=form.plain or form.region)
    assert_same(run(Net(method), [form], Compiler("aot_eager")), run(Net(method), [instead], plain))
    if form.plain is not None:
        with pytest.raises(RuntimeError, match="modified inplace"):
            run(Net(method), [form], plain)


@each_layer
def test_two_layers_in_a_region_for_all_sizes(method: str) -> None:
    def gradients(compiler: Function) -> list[Found]:
        nets = Net(method), Net(method)

        def both(x: Tensor, y: list[Tensor]) -> Tensor:
            return part(nets[0], *ALL)(x, y) + 0.5 * part(nets[1], *ALL)(2.0 * x, y)  # type: ignore[no-any-return]

        compiled, found = compiler(both), []
        for i, size in enumerate(SIZES[:2]):
            data = made(i, size)
            parameters = [p for net in nets for p in net.model.parameters()]
            found.append(dict(enumerate(torch.autograd.grad(compiled(*data), parameters))))
        return found  # type: ignore[return-value]

    assert_same(gradients(Compiler("aot_eager", dynamic=True)), gradients(plain))


@pytest.mark.parametrize("layer", [AlignedMTL(3, rtol=1e-6), CAGrad(3, 0.4), FairGrad(3, 1.5)], ids=str)
def test_one_layer_again_and_again_in_a_region_for_all_sizes(layer: nn.Module) -> None:
    weight = normal(0, 5, 4).requires_grad_()

    def three_times(x: Tensor) -> Tensor:
        views = [view for _ in range(3) for view in layer(x @ weight)]
        return torch.stack([((k + 2.0) * view).cos().sum() for k, view in enumerate(views)]).sum()

    compiled = Compiler("aot_eager", dynamic=True)(three_times)
    for size in SIZES:
        x = normal(size, size, 5)
        found, expected = (torch.autograd.grad(call(x), weight)[0] for call in (compiled, three_times))
        assert near(found, expected, 1e-11)


@slow
@pytest.mark.parametrize(
    ("method", "options"), [("aligned", {}), ("bayesagg", {"statistics": "streaming"})], ids=LAYERS
)
def test_inductor(method: str, options: dict[str, Any]) -> None:
    """What compiled code may reuse is not kept."""
    chosen = [FORMS[form] for form in ("features beside", "logged total", "views of views")]
    found = run(Net(method, **options), chosen, Compiler("inductor", dynamic=True), SIZES[:2])
    assert_same(found, run(Net(method, **options), chosen, plain, SIZES[:2]))


with_inductor = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])


@with_inductor
@each_layer
def test_without_gradients(method: str, backend: str) -> None:
    """Views, or the features themselves, are right here: what is done to one is done to all, inside and outside."""

    def region(net: Net, features: Tensor, data: Data) -> Sequence[Tensor]:
        with torch.no_grad():
            views = net.backbone(*data)
            one, other = net.layer(views, data.y), net.layer(features, data.y)
            one[0].add_(1.0)
            other[1].mul_(3.0)
        return views, *one, *other

    found = []
    for compiler in (Compiler(backend), plain):
        net, data = Net(method), made(0, 6)
        features = normal(1, 6, 5)
        results = compiler(lambda *given, net=net: region(net, given[0], Data(*given[1:])))(features, *data)
        results[1].sub_(0.5)
        results[5].sub_(0.5)
        found.append({str(i): result for i, result in enumerate([features, *results])})
        total = part(net, 2, 4)(net.layer(features, data.y), data.y)
        gradient = torch.autograd.grad(total, list(net.model.heads.parameters()))
        found[-1].update({f"gradient {i}": g for i, g in enumerate(gradient)})
    assert_same(found[:1], found[1:])


# ---- what is kept between forward and backward, and from step to step ------------------------------------------------


@pytest.mark.parametrize(
    ("regions", "backend"),
    [
        ([ALL], "aot_eager"),
        ([(0, 1), (4, 4)], "aot_eager"),
        pytest.param([ALL], "inductor", marks=slow),
        pytest.param([(4, 4)], "inductor", marks=slow),
    ],
    ids=["all", "layer and total apart", "all, inductor", "total, inductor"],
)
def test_bayesaggs_passes_before_their_backwards(regions: list[tuple[int, int]], backend: str) -> None:
    """Each total remembers its own pass, and goes back through it once."""

    def gradients(compiler: Function) -> list[Found]:
        net = Net("bayesagg")
        train(net, ALL, sizes=[6])
        ends, stages, first = dict(regions), list[Function](), 0
        while first < 5:
            last = ends.get(first, first)
            stages.append(compiler(part(net, first, last)) if first in ends else part(net, first, last))
            first = last + 1
        totals = []
        for i, factor in enumerate((8.0, 0.5, 3.0)):
            data = made(i, 6)
            value: Any = data.x
            for stage in stages:
                value = stage(value, data.y)
            totals.append(factor * value)
        shared = net.model.shared
        found = [dict(enumerate(torch.autograd.grad(totals[i], shared, retain_graph=True))) for i in (1, 0, 2)]
        for total in totals:
            with pytest.raises(RuntimeError, match="expected one backward through a call of the layer, found a second"):
                total.backward()
        return found  # type: ignore[return-value]

    with torch._functorch.config.patch(donated_buffer=False):  # torch's own condition for retain_graph
        assert_same(gradients(Compiler(backend)), gradients(plain))


def test_two_passes_of_bayesagg_in_one_graph() -> None:
    """Even of the same features: neither is left out, and each total belongs to the pass before it."""
    found = []
    for compiler in (Compiler("aot_eager"), plain):
        net, data = Net("bayesagg"), made(0, 6)
        train(net, ALL)
        net.own.refresh()
        before = unpacked(net.own.get_extra_state())["full_data"][0]["counts"][0]

        def twice(x: Tensor, y: list[Tensor], net: Net = net) -> Tensor:
            return 2 * part(net, 1, 4)(x, y) + 3 * part(net, 1, 4)(x, y)  # type: ignore[no-any-return]

        features = net.model.backbone(data.x).detach().requires_grad_()
        compiler(twice)(features, data.y).backward()
        after = unpacked(net.own.get_extra_state())["full_data"][0]["counts"][0]
        assert (before, after) == (0, 12)
        found.append(features.grad)
        torch.testing.assert_close(features.grad, 5 * net.own.aggregate(features, data.y))
    assert torch.equal(*found)  # type: ignore[arg-type]


@slow
def test_copies_of_a_compiled_bayesagg_are_their_own() -> None:
    net = Net("bayesagg")
    compiled = Compiler("eager")(part(net, *ALL))

    def go_on(net: Net, compiled: Function) -> list[Found]:
        return net.train(lambda data: net.backward(compiled(*data), data.y))

    go_on(net, compiled)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    others = [copy.deepcopy(net), torch.load(file, weights_only=False)]
    before = contents(others[0].model), others[0].own.state_dict()
    expected = go_on(net, compiled)
    for other in others:
        for values, own in zip(before, (contents(other.model), other.own.state_dict())):
            assert all(torch.equal(own[name], value) for name, value in values.items())
        assert_same(go_on(other, Compiler("eager")(part(other, *ALL))), expected, 0.0)


def test_bayesagg_refuses_inside_a_graph() -> None:
    net, data = Net("bayesagg"), made(0, 6)
    data.y[2][2] = 7
    with pytest.raises(ValueError, match=r"BayesAgg: heads\[2\]: targets: expected class indices from 0 to 2"):
        Compiler("aot_eager")(part(net, *ALL))(*data)


def test_passes_of_bayesagg_end_with_their_graphs() -> None:
    net = Net("bayesagg")
    for compiler in (plain, Compiler("aot_eager")):
        call = compiler(part(net, *ALL))
        gc.collect()  # of the tests before
        before = len(passes._PASSES)
        total = call(*made(0, 6))
        assert len(passes._PASSES) == before + 1
        total.backward()
        del total
        assert len(passes._PASSES) == before


def test_hooks_that_copy_what_bayesagg_saves() -> None:
    """Eager passes do not mind; compiled ones are refused."""
    net = Net("bayesagg")
    train(net, ALL)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        eager, traced = (compiler(part(net, *ALL))(*made(0, 6)) for compiler in (plain, Compiler("aot_eager")))
    eager.backward()
    with pytest.raises(RuntimeError, match="BayesAgg: expected the pass that this backward belongs to, found it gone"):
        traced.backward()


@with_inductor
def test_aligned_weights_that_are_looked_at_in_a_region(backend: str) -> None:
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
        assert not torch.equal(results[0][1], results[1][1])
        return [
            {"gradient": torch.autograd.grad(total, w)[0], **{str(i): v.detach() for i, v in enumerate(shown)}}
            for *shown, total in results
        ]

    assert_same(steps(Compiler(backend)), steps(plain))


# ---- an optimizer's step, metrics, copies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["adamw", pytest.param("rmsprop", marks=slow), pytest.param("adagrad", marks=slow)],
    ids=lambda name: f"adatask {name}",
)
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

    assert_same(steps(Compiler("aot_eager", fullgraph=False)), steps(plain))


def test_gradient_statistics() -> None:
    def steps(compiler: Function) -> list[Found]:
        weights = torch.linspace(1.0, 2.0, 3)
        compiled = compiler(lambda rows: (*metrics.gradient_statistics(2.0 * rows, weights), rows))
        return [{str(i): t for i, t in enumerate(compiled(normal(0, 3, size)))} for size in SIZES]

    assert_same(steps(Compiler("aot_eager")), steps(plain))


def test_copies_are_an_operator() -> None:
    tensors = [normal(0, 3, 4).mT, torch.tensor(2), torch.zeros(0)]
    torch.library.opcheck(torch.ops.mtlgrad.copies.default, (tensors,))
    found = copies(tensors)
    for one, tensor in zip(found, tensors, strict=True):
        assert torch.equal(one, tensor)
        assert one.stride() == tensor.stride()
        assert not one.numel() or one.data_ptr() != tensor.data_ptr()
