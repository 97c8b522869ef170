"""What every declared operation has, from one table with a row or more an operation: operators as torch wants them,
fake tensors, torch.compile with regions that end anywhere, autocast, a way without kernels, ``out=``, layouts,
derivatives, and errors in words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mtlgrad import ops
from mtlgrad.ops import Operation, _native
from mtlgrad.ops.align import empty_result
from mtlgrad.ops.moments import run_weighted_mean
from tests.ops import test_adatask as adatask
from tests.ops.test_moments import binary, generator, multiclass, regression
from tests.ops.test_moments import normal as draw
from tests.support.bounds import near, normal

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo and inductor themselves use what torch deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
Call = Callable[..., Any]
Types = tuple[torch.dtype, torch.dtype]


# ---- the table -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An operation by the function that users call, in one form of its arguments."""

    sample: Callable[[int], list[Tensor]]  #: all its tensors, for a size that may vary; floating ones float64
    call: Call  #: of the tensors, one by one; `out=` where there is one
    derivative: bool = False
    into: Callable[[Any], dict[str, Any]] | None = None  #: from a result, the options that have it written to
    empty: Callable[[], list[Tensor]] | None = None  #: a sample that has nothing to compute
    others: int | None = None  #: from here on, tensors have the second of two types
    types: Sequence[Types] = ((F32, F32), (F64, F64), (BF16, BF16))
    fixed: Sequence[int] = ()  #: tensors of one type, and dense
    dense: bool = False  #: all of them
    changed: Sequence[int] = ()  #: tensors that are written to
    symmetric: Sequence[int] = ()  #: matrices
    tolerance: float = 1e-6  #: in float32, of the way without kernels
    names: Sequence[str] = ()  #: of the first tensors

    def of(self, types: Types, tensors: Sequence[Tensor] | None = None) -> list[Tensor]:
        given = self.sample(5) if tensors is None else tensors
        split = len(given) if self.others is None else self.others
        return [
            t.to(types[i >= split]) if t.is_floating_point() and i not in self.fixed else t.clone()
            for i, t in enumerate(given)
        ]


class Form(NamedTuple):
    """T = 3 gradients as users give them."""

    tensors: Callable[[int], list[Tensor]]
    rows: Callable[[Sequence[Tensor]], Any]
    like: Callable[[int, int], list[Tensor]]  #: a row's tensors, from a seed


def parts(seed: int, n: int) -> list[Tensor]:
    return [normal(seed + p, *shape) for p, shape in enumerate([(n,), (2, n), (2, 3, n, 2)])]


def listed(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [list(tensors[t : t + 3]) for t in (0, 3, 6)]


FORMS = {
    "a tensor": Form(lambda n: [normal(1, 3, n)], lambda t: t[0], lambda seed, n: [normal(seed, n)]),
    "lists": Form(lambda n: [p for t in range(3) for p in parts(3 * t, n)], listed, parts),
    "stacks": Form(
        lambda n: [torch.stack(row) for row in zip(*(parts(3 * t, n) for t in range(3)))],
        lambda t: ops.Stacked(list(t)),
        parts,
    ),
}


def of_rows(name: str, form: Form) -> Iterator[tuple[str, Row]]:
    """The operations over `Rows`."""
    count, single = len(form.tensors(1)), len(form.like(0, 1)) == 1
    few = slice(count, count + len(form.like(0, 1)))
    mixed = ((F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32))

    def vector(tensors: Sequence[Tensor]) -> Any:
        return tensors[count] if single else list(tensors[few])

    def make(call: Call, more: Callable[[int], list[Tensor]], **options: Any) -> Row:
        def sample(n: int) -> list[Tensor]:
            return [*form.tensors(n), *more(n)]

        return Row(sample, call, empty=lambda: sample(0), others=count, **options)

    def out(like: Any) -> dict[str, Any]:
        return {"out": like}

    yield f"gram, {name}", make(lambda *t: ops.gram(form.rows(t)), lambda n: [], derivative=True)
    yield (
        f"dots, {name}",
        make(
            lambda *t: ops.dots(form.rows(t[:count]), vector(t)),
            lambda n: form.like(20, n),
            derivative=True,
            types=mixed,
        ),
    )
    yield (
        f"combine, {name}",
        make(
            lambda *t, **o: ops.combine(form.rows(t[:count]), t[count], **o),
            lambda n: [normal(30, 3)],
            derivative=True,
            into=out,
        ),
    )
    yield (
        f"displace, {name}",
        make(
            lambda *t, **o: ops.displace(vector(t), form.rows(t[:count]), t[-1], **o),
            lambda n: [*form.like(20, n), normal(30, 3)],
            derivative=True,
            into=out,
            types=mixed,
            tolerance=0.0,
        ),
    )
    yield (
        f"merge, {name}",
        make(
            lambda *t, **o: ops.merge(form.rows(t[:count]), t[count], "rmse", **o),
            lambda n: [normal(30, 3).abs()],
            into=lambda found: {"out": found[0], "result": found[1]},
        ),
    )


def matrix(tasks: int, call: Call, *more: Tensor, fixed: Sequence[int] = ()) -> Row:
    """A function of a Gram matrix."""
    return Row(
        lambda n: [(rows := normal(n, tasks, 40)) @ rows.mT, *more],
        call,
        into=lambda found: {"out": found},
        types=((F64, F64), (F32, F32), (BF16, BF16)),
        fixed=fixed,
        symmetric=[0],
    )


def of_gram() -> Iterator[tuple[str, Row]]:
    preference = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    yield "align", matrix(3, lambda m, p, **o: ops.align(m, p, "median", **o), preference)
    yield "align, one task", matrix(1, lambda m, **o: ops.align(m, **o))
    yield "align, more than a kernel takes", matrix(65, lambda m, **o: ops.align(m, scale="rmse", **o))
    yield "upgrad", matrix(3, ops.upgrad, preference)
    yield "dualproj", matrix(3, ops.dualproj, preference)
    yield "mgda", matrix(3, ops.mgda)
    yield "cagrad", matrix(3, lambda m, **o: ops.cagrad(m, 0.4, **o))
    yield "fairgrad", matrix(3, lambda m, **o: ops.fairgrad(m, 2.0, False, **o))
    yield "imtlg", matrix(3, ops.imtlg)
    yield "imtlg, more than a kernel takes", matrix(65, ops.imtlg)
    yield "pcgrad", matrix(3, lambda m, step, **o: ops.pcgrad(m, 5, step, **o), torch.tensor(7), fixed=[1])


def of_adatask(kind: str, options: dict[str, Any]) -> tuple[str, Row]:
    """`options`: of the call; a tensor among them is one of the row's."""
    rule = adatask.RULES[kind]
    more = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    whole = [(F64, F64)] * 2
    names = list(adatask.begin(rule, [()] * 2, 3, whole).named())
    changed = [i for i, name in enumerate(names) if not name.startswith(("steps", "squares"))]
    small = [i for i, name in enumerate(names) if name.startswith(("steps", "squares"))]
    last = len(names) + 2

    def sample(n: int) -> list[Tensor]:
        state = adatask.begin(rule, [(2, 3, n, 2), ()], 3, whole)
        return [*state.named().values(), *adatask.gradients(state, 3), *more.values()]

    def call(*tensors: Tensor) -> list[Tensor]:
        named = dict(zip(names, tensors))
        state = adatask.State.of(named, rule)
        given = options | dict(zip(more, tensors[last:]))
        adatask.call(ops, rule, state, tensors[len(names) : last], **given)
        return list(tensors[: len(names)])

    fixed = [*small, *range(last, last + len(more))]
    row = Row(sample, call, fixed=fixed, changed=changed, empty=lambda: sample(0), names=names)
    return f"adatask_{rule.op}, {kind}", row


def moments(call: Call, make: Callable[..., Any], symmetric: Sequence[int] = (), **options: Any) -> Row:
    """A function of a case of :mod:`test_moments`, with its tensors in a row."""

    def sample(n: int, width: int = 3) -> list[Tensor]:
        return tree_leaves(tuple(make(n, n, width, **options)))

    # A full covariance of D = 0 is taken for a diagonal one.
    empty = None if make is multiclass and not options else lambda: sample(2, 0)
    return Row(sample, call, True, empty=empty, symmetric=symmetric, types=((F32, F32), (F64, F64)))


def of_moments() -> Iterator[tuple[str, Row]]:
    yield "regression_moments", moments(ops.regression_moments, regression, [3])
    yield "regression_moments, bias", moments(ops.regression_moments, regression, [3], bias=True, per_output=True)
    yield "binary_moments", moments(ops.binary_moments, binary, [3])
    yield "binary_moments, diagonal", moments(ops.binary_moments, binary, diagonal=True)

    def classes(h: Tensor, y: Tensor, w: Tensor, *s: Tensor) -> Any:
        return ops.multiclass_moments(h, y, w, s if len(s) == 2 else s[0], num_points=16)  # type: ignore[arg-type]

    yield "multiclass_moments", moments(classes, multiclass, [3])
    yield "multiclass_moments, kron", moments(classes, multiclass, [3, 4], structure="kron")
    for kind, make in (("binary", binary), ("multiclass", multiclass)):

        def samples(n: int, width: int = 3, make: Any = make) -> list[Tensor]:
            return [*make(n, n, width)[:2], draw(generator(n), 7, 3, width + 1)]

        def sampled(*t: Tensor, kind: str = kind) -> Any:
            return ops.sampled_moments(*t, kind=kind)

        yield f"sampled_moments, {kind}", Row(samples, sampled, True, empty=lambda s=samples: s(2, 0))
    yield (
        "precision_mean",
        Row(
            lambda n: [draw(generator(n), 4, 3, n), draw(generator(n + 1), 4, 3, n).square() + 0.1],
            lambda e, v: ops.precision_mean(e, v, [0.3, 1.0, 0.5]),
            True,
            empty=lambda: [torch.empty(4, 3, 0, dtype=F64)] * 2,
        ),
    )
    yield (
        "weighted_mean",  # of the package alone, which gives it dense tensors
        Row(
            lambda n: [normal(n, 4, n), normal(n + 1, 4, n).abs()],
            lambda n, d: run_weighted_mean(n, d),
            types=((F32, F32), (F64, F64)),
            dense=True,
        ),
    )


PRESENT = torch.tensor([True, False, True])
ROWS: dict[str, Row] = {
    **{name: row for form in FORMS for name, row in of_rows(form, FORMS[form])},
    **dict(of_gram()),
    **dict(
        of_adatask(kind, options)
        for kind, options in {
            "adam": {"task_weights": adatask.weights_of(3)},
            "amsgrad": {"present": PRESENT, "keys": [1, 2**40]},
            "momentum": {},
            "centered": {"present": PRESENT, "keys": [1, 2**40]},
            "adagrad": {},
            "adagrad, decay": {"present": PRESENT, "keys": [1, 2], "task_weights": adatask.weights_of(3)},
        }.items()
    ),
    **dict(of_moments()),
}
every_row = pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))
with_out = [name for name, row in ROWS.items() if row.into]


def spoiled(t: Tensor) -> Tensor:
    return torch.full_like(t, torch.nan) if t.is_floating_point() else torch.ones_like(t)


def offset(t: Tensor) -> Tensor:
    return torch.cat([spoiled(t.new_empty(1)), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "sliced": lambda t: torch.cat([t, spoiled(t)], -1)[..., : t.shape[-1]] if t.dim() else t,
    "every other": lambda t: torch.stack([t, spoiled(t)], -1)[..., 0],
    "first last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else offset(t),
    "offset": offset,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
}


def laid_out(row: Row, tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    kept = {*row.fixed, *(row.symmetric if layout == "expanded" else ())}
    kept |= set(row.changed) if layout == "expanded" else set()
    return [t if row.dense or i in kept else LAYOUTS[layout](t) for i, t in enumerate(tensors)]


def run(row: Row, tensors: Sequence[Tensor], **options: Any) -> list[Tensor]:
    return tree_leaves(row.call(*tensors, **options))


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str = "") -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, (what, i)
        if not tolerance or not other.is_floating_point():
            same = torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())
            assert same, (what, i)
        elif other.numel():
            allowed = max(tolerance, 1e-6) if other.dtype == F32 else tolerance
            assert torch.equal(one.isfinite(), other.isfinite()), (what, i)
            one, other = (t.nan_to_num(posinf=0.0, neginf=0.0) for t in (one, other))
            assert near(one, other, allowed), (what, i, one, other)


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, list[Any]]]]:
    """The operators whose work is done, with the arguments that torch's dispatcher would give them."""
    found: list[tuple[Any, list[Any]]] = []
    directly = Operation._directly

    def record(self: Operation, device_type: str, arguments: Sequence[Any], out: list[Tensor] | None = None) -> Any:
        operator = getattr(torch.ops.mtlgrad, self.name if out is None else f"{self.name}_like").default
        found.append((operator, [*self._flat(arguments), *([] if out is None else [out])]))
        return directly(self, device_type, arguments, out)

    with patch.context() as context:
        context.setattr(Operation, "_directly", record)
        yield found


def operations() -> dict[str, Operation]:
    modules = [module for name, module in sys.modules.items() if name.startswith("mtlgrad.")]
    found = [value for module in modules for value in list(vars(module).values())]
    return {value.name: value for value in found if type(value) is Operation}


def test_no_operation_is_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as calls:
        for row in ROWS.values():
            result = row.call(*row.of((F64, F64)))
            if row.into:
                row.call(*row.of((F64, F64)), **row.into(result))
    declared = operations()
    expected = {*declared, *(f"{name}_like" for name, own in declared.items() if own._check_out is not None)}
    assert {operator.name().partition("::")[2] for operator, _ in calls} == expected
    assert {name.partition(",")[0] for name in ROWS} == declared.keys()
    assert {op.partition(",")[0] for op, _, _ in BAD} | {"weighted_mean"} == declared.keys()


# ---- operators -------------------------------------------------------------------------------------------------------


def opcheck(row: Row, tensors: Sequence[Tensor], tests: Sequence[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, recorded(patch) as calls:
        result = row.call(*tensors)
        if row.into:
            row.call(*tensors, **row.into(result))
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=tests)


@every_row
def test_opcheck(row: Row) -> None:
    """Above all that the traced version has the shapes, types and strides of the real one, and that nothing is changed
    but what the schema says."""
    first = row.of(row.types[0])
    cases = [row.of(types) for types in row.types]
    cases += [laid_out(row, first, layout) for layout in (LAYOUTS if row.changed else ("transposed", "offset"))]
    for tensors in cases:
        opcheck(row, tensors, ("test_schema", "test_faketensor"))


@pytest.mark.slow
@every_row
def test_opcheck_with_derivatives(row: Row) -> None:
    tests = "test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"
    opcheck(row, laid_out(row, row.of(row.types[0]), "channels_last"), tests)


@every_row
def test_fake_tensors(row: Row) -> None:
    """Traced without any memory, whatever types, sizes and layouts."""
    samples = [row.of(types) for types in row.types]
    samples += [laid_out(row, samples[0], layout) for layout in LAYOUTS]
    samples += [row.of(row.types[0], row.empty())] if row.empty else []
    for tensors in samples:
        found = []
        for mode in (None, FakeTensorMode()):
            with mode or nullcontext():
                given = list(map(mode.from_tensor, tensors)) if mode else tensors
                found.append([(t.shape, t.dtype, t.stride()) for t in run(row, given)])
        assert found[0] == found[1]


class Names(TorchDispatchMode):
    """Writes down which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mtlgrad":
            self.found.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(ROWS))
def test_a_mode_sees_the_operators(name: str) -> None:
    """Those that are called directly where nobody looks; the results are the same."""
    row = ROWS[name]
    expected = run(row, row.of((F64, F64)))
    with Names() as names:
        result = row.call(*row.of((F64, F64)))
        if row.into:
            row.call(*row.of((F64, F64)), **row.into(result))
    operator = name.partition(",")[0]
    assert names.found == [operator, *([f"{operator}_like"] if row.into else [])]
    assert_alike(tree_leaves(result), expected, 0.0)


def test_the_schema_says_what_changes() -> None:
    """torch.compile goes by it."""
    of_moments = {
        "adatask_adam": {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"},
        "adatask_rmsprop": {"square_avgs", "grad_avgs", "momentum_buffers"},
        "adatask_adagrad": {"state_sums"},
    }
    for name in operations():
        for operator in (name, f"{name}_like"):
            if hasattr(torch.ops.mtlgrad, operator):
                schema = getattr(torch.ops.mtlgrad, operator).default._schema
                changed = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
                own = of_moments.get(name)
                assert changed == ({"parameters", *own, "steps", "squares"} if own else set())


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in leaves(part)]


def ends_at_it(call: Call, tensors: Sequence[Tensor], halved: Sequence[bool]) -> list[Tensor]:
    """And goes on with another part of the results."""
    results = leaves(call(*tensors))
    return [*results[::2], *(result.cos().sum() for result in results)]


def within(call: Call, tensors: Sequence[Tensor], halved: Sequence[bool]) -> list[Tensor]:
    """Of arguments that are made in the region, and returned, with views of the results, some of them twice."""
    made = [t * 0.5 if half else t.clone() for t, half in zip(tensors, halved)]
    results = leaves(call(*made))
    return [*made, *results, *results, *(r.detach() for r in results), *(r.flatten()[1:] for r in results)]


def mark_varying(rows: Sequence[Row], given: Sequence[Sequence[Tensor]]) -> None:
    """Have sizes that are not the same in every step compiled for all that follow."""
    for row, own in zip(rows, given):
        for tensor, one, other in zip(own, row.sample(4), row.sample(6)):
            for dim in range(tensor.dim()):
                if one.shape[dim] != other.shape[dim]:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def steps(region: Call, compiler: Call, rows: Sequence[Row], sizes: Sequence[int], layouts: Any) -> list[list[Tensor]]:
    """Results, what became of the arguments, and gradients, size by size."""
    calls = [row.call for row in rows]
    halved = [[t.is_floating_point() and i not in row.fixed for i, t in enumerate(row.sample(2))] for row in rows]

    def compute(tensors: list[list[Tensor]]) -> list[list[Tensor]]:
        return [region(*given) for given in zip(calls, tensors, halved)]

    compiled, found = compiler(compute), []
    for size in sizes:
        given = [row.of((F64, F64), row.sample(size)) for row in rows]
        if layouts:
            given = [laid_out(row, own, layout) for row, own, layout in zip(rows, given, cycle(layouts))]
        wanted = [t for row, own in zip(rows, given) if row.derivative for t in own if t.is_floating_point()]
        wanted = [t.requires_grad_() for t in wanted]
        if len(sizes) > 1:
            mark_varying(rows, given)
        results = compiled(given)
        losses = [result.square().sum() for result in leaves(results) if result.requires_grad]
        gradients = torch.autograd.grad(sum(losses), wanted) if wanted else ()  # type: ignore[arg-type]
        found.append([t.detach().clone() for t in [*leaves(results), *leaves(given), *gradients]])
    return found


def assert_compiles(region: Call, rows: Sequence[Row], sizes: Sequence[int], layouts: Any = (), **options: Any) -> None:
    torch.compiler.reset()
    found = steps(region, lambda f: torch.compile(f, fullgraph=True, **options), rows, sizes, layouts)
    for one, other in zip(found, steps(region, lambda f: f, rows, sizes, layouts), strict=True):
        assert_alike(one, other, 1e-11)


#: One form of a kind.
FORMS = [name for name in ROWS if name.endswith((", lists", ", adam", ", binary", ", decay")) or ", " not in name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in FORMS))
        for name in ROWS
        if name != "adatask_adagrad, adagrad"
    ],
)
def test_compiles_wherever_the_region_ends(name: str) -> None:
    """For one size."""
    row = ROWS[name]
    if name == "multiclass_moments, kron":  # whose derivative is in plain torch that of the other, at half the time
        row = row._replace(derivative=False)
    assert_compiles(within, [row], (6,), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_compiles_for_all_sizes(name: str) -> None:
    """Opcheck does it with every row."""
    assert_compiles(within, [ROWS[name]], (6, 4), backend="aot_eager")


def family(name: str) -> str:
    starts = {"rows": ("gram", "dots", "combine", "displace", "merge"), "adatask": ("adatask",)}
    return next((key for key, start in starts.items() if name.startswith(start)), "others")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["rows", "adatask", "others"])
def test_under_inductor(chosen: str) -> None:
    """Many operations in one graph, with other work on the same tensors, in every layout."""
    rows = [row for name, row in ROWS.items() if family(name) == chosen and not name.endswith("a tensor")]
    if chosen == "others":  # whose derivatives are those of plain torch
        rows = [row._replace(derivative=False) for row in rows]
    assert_compiles(ends_at_it, rows, (5,), list(LAYOUTS))


# ---- out= and result=: arguments, parts of them, what the region made ------------------------------------------------


def align_twice(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    result = ops.align(rows @ rows.mT, out=empty_result(3, torch.device("cpu")))
    first = result.weights * 2.0
    return [first, *ops.align(rows.exp() @ rows.mT.exp(), out=result)]


def merge_to_parts(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    result = empty_result(3, torch.device("cpu"))
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


def rule_to_parts(rows: Tensor, buffer: Tensor, weights: Tensor) -> list[Tensor]:
    made = buffer.sin()
    ops.mgda(rows @ rows.mT, out=made[1, 1:4])
    return [ops.upgrad(rows @ rows.mT, out=buffer[2, :3]), made]


WRITERS: list[Call] = [align_twice, merge_to_parts, combine_to_parts, displace_to_parts, rule_to_parts]


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_results_that_are_written_to_under_inductor(writer: Call) -> None:
    torch.compiler.reset()
    found = []
    for call in (torch.compile(writer, fullgraph=True), writer):
        found.append([])
        for seed, size in enumerate((7, 5, 6)):
            given = [normal(3 * seed, 3, size), normal(3 * seed + 1, 4, size), normal(3 * seed + 2, 3)]
            results = call(*given)
            found[-1] += [t.clone() for t in [*results, *given]]
    assert_alike(*found, 1e-11)


@pytest.mark.parametrize("name", with_out)
def test_written_where_it_is_told(name: str, device: str) -> None:
    """The same bits, in any element order; it has no derivative, and other work sees that it was written."""
    row = ROWS[name]
    assert row.into is not None
    tensors = [t.to(device) for t in row.of(row.types[0])]
    like = row.call(*tensors)
    expected = tree_leaves(like)
    wanting = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    for order in (torch.contiguous_format, torch.channels_last):

        def new(t: Tensor, order: torch.memory_format = order) -> Tensor:
            return torch.full_like(t, 7, memory_format=order if t.dim() == 4 else torch.preserve_format)

        options = row.into(tree_map_only(Tensor, new, like))
        out = tree_leaves(options)
        watched = [t.requires_grad_() for t in out if t.is_floating_point()]
        losses = [t.square().sum() for t in watched if t.numel()]
        with torch.no_grad():
            found = tree_leaves(row.call(*wanting, **options))
        assert all(a is b for a, b in zip(found, out, strict=True))
        assert_alike([t.detach() for t in found], expected, 0.0)
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        plain = row.into(tree_map_only(Tensor, new, like))
        assert not any(t.requires_grad for t in tree_leaves(row.call(*wanting, **plain)))
        with torch.inference_mode():
            row.call(*tensors, **row.into(tree_map_only(Tensor, new, like)))


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("adatask")])
def test_other_work_sees_what_was_changed(name: str) -> None:
    """Autograd refuses a graph whose tensors a step changed, as it does with torch.optim."""
    row = ROWS[name]
    tensors = row.of((F32, F32))
    named = dict(zip(row.names, tensors))
    leaf = named["parameters[0]"].requires_grad_()
    versions, loss = {name: t._version for name, t in named.items()}, leaf.square().sum()
    with torch.no_grad():
        row.call(*tensors)
    assert all(t._version > versions[n] for n, t in named.items() if n.startswith(("parameters", "steps")))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_of_views(dynamic: bool) -> None:
    """A row of a block lies at an offset, which inductor loses if it depends on a dynamic size: then it is refused."""

    def step(block: Tensor, jacobian: Tensor, counts: Tensor, lr: Tensor) -> Tensor:
        ops.adatask_adagrad([block[1]], [jacobian], [[block[2], block[3]]], [counts], lr=lr)
        return 2.0 * block

    def given() -> list[Tensor]:
        return [normal(0, 4, 5).abs() + 1.0, normal(1, 2, 5), torch.zeros(2), torch.tensor(0.1)]

    torch.compiler.reset()
    own, expected = given(), given()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    if dynamic:
        refused = torch._dynamo.exc.TorchDynamoException
        with pytest.raises(refused, match="adatask_adagrad: expected to change tensors at"):
            compiled(*own)
    else:
        assert_alike([compiled(*own), *own], [step(*expected), *expected], 1e-11)


# ---- with the same numbers: autocast, no kernels, layouts, memory ----------------------------------------------------


@every_row
def test_autocast_does_not_reach_them(row: Row) -> None:
    expected = run(row, row.of(row.types[0]))
    for mode in (None, Names()):
        with torch.autocast("cpu", dtype=BF16):
            if mode is None:
                inside = run(row, row.of(row.types[0]))
            else:
                with mode:
                    inside = run(row, row.of(row.types[0]))
        assert_alike(inside, expected, 0.0)


@every_row
def test_without_kernels_the_reference_serves(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same results, layouts and writes in place on a device that no kernel was built for."""
    first = row.of(row.types[0])
    samples = {"dense": first} | {layout: laid_out(row, first, layout) for layout in LAYOUTS}
    samples |= {"empty": row.of(row.types[0], row.empty())} if row.empty else {}
    for layout, tensors in samples.items():
        found = []
        for kernels in (_native.KERNELS["cpu"], None):
            monkeypatch.setitem(_native.KERNELS, "cpu", kernels)
            given = laid_out(row, [t.clone() for t in first], layout) if row.changed and layout in LAYOUTS else tensors
            result = row.call(*[t.clone() for t in given] if layout == "empty" or layout == "dense" else given)
            found.append(tree_leaves(result))
            if row.into:
                out = row.into(tree_map_only(Tensor, lambda t: torch.full_like(t, 7), result))
                found[-1] = [*found[-1], *tree_leaves(row.call(*given, **out))]
        assert [t.stride() for t in found[0]] == [t.stride() for t in found[1]]
        assert_alike(found[0], found[1], row.tolerance, layout)


@every_row
def test_layouts(row: Row, device: str) -> None:
    """Of all tensors, and their results are those of dense ones; what is only read stays as it was."""
    for types in row.types[:1]:
        for layout in LAYOUTS:
            tensors = laid_out(row, [t.to(device) for t in row.of(types)], layout)
            dense = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
            copies = [t.clone() for t in tensors]
            assert_alike(run(row, tensors), run(row, dense), 1e-6, layout)
            read = [i for i in range(len(tensors)) if i not in (*row.changed, *row.fixed)]
            assert all(torch.equal(tensors[i], copies[i]) for i in read)
        if row.empty:
            run(row, [t.to(device) for t in row.of(types, row.empty())])


@every_row
def test_nothing_of_what_was_in_memory_remains(row: Row, device: str) -> None:
    """torch fills new memory with NaN where algorithms are to be deterministic."""

    def results() -> list[Tensor]:
        return run(row, [t.to(device) for t in row.of(row.types[0])])

    expected = results()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        found = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_alike(found, expected, 0.0)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@every_row
def test_derivatives(row: Row) -> None:
    """Those of the kernels, by finite differences; some inputs constant. Twice, where the operation says so."""
    sample = row.of((F64, F64), row.sample(2))
    floating = [i for i, t in enumerate(sample) if t.is_floating_point()]
    if not row.derivative:
        given = [
            t.requires_grad_() if i in floating and i not in (*row.changed, *row.fixed) else t
            for i, t in enumerate(sample)
        ]
        assert not any(t.requires_grad for t in run(row, given))
        return

    def call(*some: Tensor, at: Sequence[int]) -> Any:
        given = list(sample)
        for i, t in zip(at, some):
            given[i] = (t + t.mT) / 2 if i in row.symmetric else t  # finite differences must stay symmetric
        return tuple(tree_leaves(row.call(*given)))

    rough = {"rtol": 1e-2, "atol": 1e-4} if row is ROWS["multiclass_moments"] else {}
    for at in (floating, floating[-1:]):
        leaves = [sample[i].detach().clone().requires_grad_() for i in at]
        assert torch.autograd.gradcheck(lambda *some, at=at: call(*some, at=at), leaves, **rough)


# ---- errors ----------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any] | dict[str, Any]


def at(name: str, *places: int) -> Callable[..., Change]:
    """Another tensor in a list, or none (no `change`)."""

    def with_(change: Call | None = None) -> Change:
        def in_place(arguments: dict[str, Any]) -> None:
            inner = arguments[name] = [list(x) if isinstance(x, list) else x for x in arguments[name]]
            for i in places[:-1]:
                inner = inner[i]
            if change is None:
                del inner[places[-1]]
            else:
                inner[places[-1]] = change(inner[places[-1]])

        return in_place

    return with_


def step_of(kind: str) -> tuple[Call, dict[str, Any]]:
    """All that there may be, of two parameters and three tasks."""
    rule = adatask.RULES[kind]
    state = adatask.begin(rule, [(4, 5), (7,)], 3)
    found = {"parameters": state.parameters, "jacobians": adatask.gradients(state, 3)}
    found |= {
        **state.moments,
        "steps": state.steps,
        "squares": state.squares,
        "keys": [1, 2],
        "task_weights": [1.0] * 3,
    }
    buffers = {"momentum_buffers": state.buffers} if state.buffers else {}
    return getattr(ops, f"adatask_{rule.op}"), {**found, **buffers, "present": torch.ones(3).bool(), **rule.settings}


R, B, W, EYE, META = torch.ones(3, 4), torch.ones(4), torch.ones(3), torch.eye(3), torch.device("meta")
REGRESSION, BINARY, CLASSES = regression(6, 4, 5), binary(6, 4, 5), multiclass(6, 4, 5)
SAMPLES = draw(generator(7), 7, 3, 6)


def put(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    return tensor.index_put([torch.tensor(i) for i in place], torch.tensor(value, dtype=tensor.dtype))


#: Calls that are right.
GOOD: dict[str, tuple[Call, dict[str, Any]]] = {
    "gram": (ops.gram, {"rows": R}),
    "dots": (ops.dots, {"rows": R, "vector": B}),
    "combine": (ops.combine, {"rows": R, "weights": W}),
    "displace": (ops.displace, {"base": B, "rows": R, "weights": W}),
    "merge": (ops.merge, {"rows": R}),
    "align": (ops.align, {"gram": EYE}),
    **{name: (getattr(ops, name), {"gram": EYE}) for name in ("upgrad", "dualproj", "mgda", "imtlg")},
    "cagrad": (ops.cagrad, {"gram": EYE}),
    "fairgrad": (ops.fairgrad, {"gram": EYE}),
    "pcgrad": (ops.pcgrad, {"gram": EYE, "seed": 0, "step": torch.tensor(0)}),
    **{
        f"adatask_{adatask.RULES[kind].op}, {kind}": step_of(kind)
        for kind in ("adam", "amsgrad", "centered", "momentum")
    },
    **{f"adatask_{adatask.RULES[kind].op}, {kind}": step_of(kind) for kind in ("centered, momentum", "adagrad")},
    "regression_moments": (ops.regression_moments, REGRESSION._asdict()),
    "binary_moments": (ops.binary_moments, BINARY._asdict()),
    "multiclass_moments": (ops.multiclass_moments, CLASSES._asdict()),
    "sampled_moments": (ops.sampled_moments, {**BINARY._asdict(), "samples": SAMPLES, "kind": "binary"}),
    "precision_mean": (ops.precision_mean, {"means": SAMPLES, "variances": SAMPLES**2}),
}
for name in ("mean", "covariance"):
    del GOOD["sampled_moments"][1][name]


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second one of memory whose others are NaN."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def aligned(name: str, change: Call) -> ops.AlignResult:
    return ALIGNED._replace(**{name: change(getattr(ALIGNED, name))})


def doubles(arguments: dict[str, Any]) -> None:
    for name in ("parameters", "jacobians"):
        arguments[name] = list(map(Tensor.double, arguments[name]))


ALIGNED = ops.align(EYE + torch.arange(9.0).reshape(3, 3).mT / 9)
X, Y = REGRESSION[:2]
JOINT, TWISTED, INDEFINITE = -torch.eye(18).double(), torch.eye(6).double().repeat(3, 1, 1), torch.eye(5).double()
TWISTED[:, 0, 1] = TWISTED[:, 1, 0] = 2.0
INDEFINITE[3, 3] = -1.0
IMPOSSIBLE = "covariance: expected .*positive semi-definite.*"
SHORT = "expected [4] torch.float32 on cpu, like tensor 0 of a row, found [3] torch.float32 on cpu"
NARROW = r"expected \[4\] torch.bfloat16 or torch.float32 on cpu, .* found \[4\] torch.float64"
DENSE = "expected contiguous torch.float64 on cpu"
SMALL = "expected [3] torch.float32 on cpu, contiguous, found"
MISSING = "expected 6 tensors for 2 parameters and 3 tasks, found 3"
SQUARE = "gram: expected shape [T, T] with T > 0, found"
#: What is wrong, and what the message says after the operation.
WRONG: dict[str, list[tuple[Change, str]]] = {
    "gram": [
        ({"rows": []}, "rows: expected at least one row, found none"),
        ({"rows": R[:0]}, "rows: expected at least one row, found shape [0, 4]"),
        ({"rows": torch.tensor(1.0)}, "rows: expected a tensor [T, ...] or a sequence of rows, found shape []"),
        ({"rows": [[], []]}, "rows: expected at least one tensor a row, found none"),
        ({"rows": [[R, R], [R]]}, "rows: expected 2 tensors in row 1, as in row 0, found 1"),
        (
            {"rows": [[R, R], [R, None]]},
            "rows: expected a tensor as rows[1][1] (zeros where a task does not reach), found NoneType",
        ),
        (
            {"rows": [R[0], R[1, :3]]},
            "rows: expected [4] torch.float32 in row 1, tensor 0, as in row 0, found [3] torch.float32",
        ),
        ({"rows": R.long()}, "rows: expected float32, float64, .* found torch.int64"),
        ({"rows": [R[0], R[1].to(META)]}, "rows: expected all on cpu, found meta"),
        ({"rows": ops.Stacked([])}, "rows: expected at least one tensor [T, ...], found none"),
        ({"rows": ops.Stacked([torch.tensor(1.0)])}, "rows: expected tensors [T, ...] with T > 0, found shape []"),
        ({"rows": ops.Stacked([R, R[:2]])}, "rows: expected 3 rows in every tensor, found shape [2, 4] in tensor 1"),
    ],
    "displace": [
        ({"rows": []}, "rows: expected at least one row, found none"),
        ({"base": [B], "rows": [[None]]}, r"rows: expected a tensor as rows\[0\]\[0\] .*, found NoneType"),
        ({"rows": [B, B[:3]], "weights": W[:2]}, r"rows: expected \[4\] .* in row 1, .* found \[3\]"),
        ({"base": B.long(), "rows": R.long()}, "rows: expected float32, .* found torch.int64"),
        ({"base": B[:3]}, f"base: {SHORT}"),
        ({"base": [B, B]}, "base: expected 1 tensors, found 2"),
        ({"base": []}, "base: expected 1 tensors, found 0"),
        ({"base": B.double()}, "base: expected .* torch.float32 on .*float64 on"),
        ({"base": B.bfloat16()}, "base: expected .* torch.float32 on .*bfloat"),
        ({"rows": R.half()}, "base: expected .* torch.float16 on .*float32"),
        ({"base": B.double(), "rows": R.bfloat16()}, f"base: {NARROW}"),
        ({"weights": W[:2]}, "weights: expected shape [3], found [2]"),
        ({"weights": W.long()}, "weights: expected float32, .* found torch.int64"),
        ({"weights": W.to(META)}, "weights: expected device cpu like base, found meta"),
        (
            {"base": [B, B.to(META)], "rows": [[B, B]], "weights": W[:1]},
            "base: expected .* on cpu, like tensor 1 of a row, found .* on meta",
        ),
        (
            {"rows": R.bfloat16(), "out": B.bfloat16()},
            "out: expected [4] torch.float32 on cpu, like tensor 0 of base, found [4] torch.bfloat16 on cpu",
        ),
        ({"base": [B], "out": [B, B]}, "out: expected 1 tensors, found 2"),
    ],
    "merge": [
        ({"rows": ops.Stacked([R[:0]])}, "rows: expected tensors [T, ...] with T > 0, found shape [0, 4]"),
        ({"preference": [1.0, 2.0]}, "preference: expected shape [3], found [2]"),
        ({"scale": "max"}, "scale: expected one of min, median, rmse, found 'max'"),
        ({"rtol": 2.0}, "rtol: expected a number from 0 to below 1, found 2.0"),
        ({"out": R[0, :2]}, r"out: expected \[4\] torch.float32 .*"),
    ],
    "dots": [
        ({"rows": [R[0], [R[1]]]}, "rows: expected all rows tensors, or all lists, found both"),
        ({"vector": B[:3]}, f"vector: {SHORT}"),
        ({"vector": [B, B]}, "vector: expected 1 tensors, found 2"),
        ({"vector": B.double()}, "vector: .* found .4. torch.float64"),
        ({"rows": R.bfloat16(), "vector": B.double()}, f"vector: {NARROW}"),
        ({"rows": R.half()}, "vector: expected .4. torch.float16 on .* found .*32"),
        ({"vector": B.bfloat16()}, "vector: expected .4. torch.float32 on .* found"),
    ],
    "combine": [
        ({"rows": [R[0], R[1].double()], "weights": W[:2]}, "rows: .* found .4. torch.float64"),
        ({"weights": W[:2]}, "weights: expected shape [3], found [2]"),
        ({"weights": W.to(META)}, "weights: expected device cpu .* found meta"),
        ({"out": B.double()}, "out: .* found .4. torch.float64"),
        ({"out": [B] * 2}, "out: expected 1 tensors, found 2"),
    ],
    "align": [
        ({"scale": "max"}, "scale: expected one of min, median, rmse, found 'max'"),
        ({"rtol": 1.0}, "rtol: expected a number from 0 to below 1, found 1.0"),
        ({"rtol": -1e-9}, "rtol: expected .* found -1e-09"),
        ({"rtol": float("nan")}, "rtol: expected .* found nan"),
        ({"gram": EYE[:2]}, "gram: expected shape [T, T] with T > 0, found [2, 3]"),
        ({"gram": EYE[0]}, "gram: expected shape [T, T] with T > 0, found [3]"),
        ({"gram": EYE[:0, :0]}, "gram: expected shape [T, T] with T > 0, found [0, 0]"),
        ({"gram": torch.tensor(1.0)}, "gram: expected shape [T, T] with T > 0, found []"),
        ({"gram": EYE.long()}, "gram: expected float32.* found torch.int64"),
        ({"preference": [1.0, 2.0]}, "preference: expected shape [3], found [2]"),
        ({"preference": W.to(META)}, "preference: expected device cpu .* found meta"),
        ({"out": ops.align(EYE[:2, :2])}, "out.weights: expected shape [3], found [2]"),
        ({"out": ops.AlignResult(*(v.float() for v in ALIGNED))}, f"out.weights: {DENSE}, found torch.float32 on cpu"),
        ({"out": aligned("transform", lambda t: t.mT.contiguous().mT)}, f"out.transform: {DENSE}, found torch.float64"),
    ],
    "pcgrad": [
        ({"step": torch.zeros(())}, "step: expected an int64 scalar tensor, found torch.float32 []"),
    ],
    "cagrad": [
        ({"c": -0.1}, "c: expected a finite number from 0, found -0.1"),
    ],
    "fairgrad": [
        ({"alpha": 0.0}, "alpha: expected a finite number above 0, found 0.0"),
    ],
    "adatask_adam, amsgrad": [
        (at("max_exp_avg_sqs", 1)(), f"max_exp_avg_sqs: {MISSING}"),
        (at("max_exp_avg_sqs", 0, 1)(Tensor.bfloat16), "max_exp_avg_sqs: expected .* alike for parameter 0, found"),
    ],
    "adatask_adam, adam": [
        (at("exp_avgs", 0)(), f"exp_avgs: {MISSING}"),
        (at("exp_avgs", 1, 1)(lambda t: t[1:]), "exp_avgs: expected shape [7] for parameter 1, found [6]"),
        (at("exp_avgs", 1, 1)(Tensor.bfloat16), "exp_avgs: expected .* alike for parameter 1, found torch.bfloat16"),
        (doubles, "exp_avgs: expected torch.float64, alike for parameter 0, found"),
    ],
    "adatask_rmsprop, centered": [
        (at("grad_avgs", 0)(), f"grad_avgs: {MISSING}"),
        (at("grad_avgs", 0, 0)(), "grad_avgs: expected 3 tensors, one a task, for parameter 0, found 2"),
    ],
    "adatask_rmsprop, momentum": [
        (at("momentum_buffers", 0)(), "momentum_buffers: expected 2 tensors, one a parameter, found 1"),
        ({"momentum_buffers": None}, "momentum_buffers: expected one a parameter for momentum=0.6, found none"),
        (at("momentum_buffers", 1)(Tensor.bfloat16), "momentum_buffers: expected .* parameter 1, found torch.bfloat16"),
        (at("momentum_buffers", 0)(lambda t: t.mT), r"momentum_buffers: expected shape \[4, 5\] .* found \[5, 4\]"),
        (at("momentum_buffers", 1)(lambda t: t[:1].expand(7)), "expected .*moments .* found an expanded tensor"),
    ],
    "regression_moments": [
        ({"features": X[0]}, "features: expected shape [B, D], found [5]"),
        ({"targets": Y[:, :2]}, "targets: expected shape [4, 3], found [4, 2]"),
        ({"mean": REGRESSION.mean[:, :4]}, "mean: expected shape [O, 5], found [3, 4]"),
        ({"covariance": INDEFINITE[:4]}, "covariance: expected shape [5, 5], found [4, 5]"),
        ({"features": X.long()}, "features: expected float32.* found torch.int64"),
        ({"targets": Y.to(META)}, "targets: expected device cpu .* found meta"),
        ({"features": X[:0], "targets": Y[:0]}, "features: expected at least one example, found none"),
    ],
    "binary_moments": [
        ({"nodes": 2}, "nodes: expected 3 to 512, found 2"),
        ({"mean": BINARY.mean[:, :5]}, r"mean: expected shape \[O, 6\].*"),
    ],
    "multiclass_moments": [
        ({"targets": CLASSES.targets.float()}, "targets: expected int64 class indices, found .*"),
        ({"covariance": JOINT[:5]}, r"covariance: expected shape \[18, 18\] \(full.*"),
        ({"num_points": 0}, "num_points: expected at least 1, found 0"),
        ({"covariance": (JOINT,)}, "covariance: expected a tensor or a pair of tensors, found 1"),
    ],
    "sampled_moments": [
        ({"samples": SAMPLES[:0]}, "samples: expected at least one sample, found none"),
        ({"kind": "ternary"}, "kind: expected .* 'ternary'"),
        ({"samples": SAMPLES[..., :5]}, r"samples: expected shape .*"),
    ],
    "precision_mean": [
        ({"variances": SAMPLES[:6] ** 2}, "variances: expected shape [7, 3, 6], found [6, 3, 6]"),
        ({"power": [1.0, 2.0]}, "power: expected one number or one per task (3), found 2"),
        ({"power": -1.0}, "power: expected finite numbers of at least 0, found [-1.0, -1.0, -1.0]"),
        ({"means": SAMPLES[:, :0], "variances": SAMPLES[:, :0]}, "means: expected at least one task, found none"),
    ],
}
#: Of all rules.
OF_RULES: list[tuple[Change, str]] = [
    ({"gram": torch.ones(2, 3)}, f"{SQUARE} [2, 3]"),
    ({"gram": torch.ones(0, 0)}, f"{SQUARE} [0, 0]"),
    ({"gram": EYE.expand(4, 3, 3)}, f"{SQUARE} [4, 3, 3]"),
    ({"gram": EYE.long()}, "gram: expected float32, float64, float16 or bfloat16, found torch.int64"),
    ({"out": torch.empty(2).double()}, "out: expected shape [3], found [2]"),
    ({"out": W.clone()}, f"out: {DENSE}, found torch.float32 on cpu"),
]
OF_PREFERENCES: list[tuple[Change, str]] = [
    ({"preference": B}, "preference: expected shape [3], found [4]"),
    ({"preference": B[0]}, "preference: expected shape [3], found []"),
]
#: Of all of AdaTask's, SECOND standing for a list of moments.
OF_STEPS: list[tuple[Change, str]] = [
    (at("jacobians", 1)(), "jacobians: expected 2 tensors, one a parameter, found 1"),
    (at("steps", 0)(), "steps: expected 2 tensors, one a parameter, found 1"),
    (at("squares", 0)(), "squares: expected 2 tensors, one a parameter, found 1"),
    ({"keys": [1]}, "keys: expected 2, one a parameter, found 1"),
    ({"keys": []}, "keys: expected 2, one a parameter, found 0"),
    ({"task_weights": [1.0, 2.0]}, "task_weights: expected 3 .*found 2"),
    ({"task_weights": []}, "task_weights: expected 3 .*found 0"),
    (at("jacobians", 0)(lambda t: t.mT), "jacobians: expected shape [3, 4, 5] for parameter 0, found [3, 5, 4]"),
    (at("jacobians", 1)(lambda t: t[:2]), "jacobians: expected shape [3, 7] for parameter 1, found [2, 7]"),
    (at("jacobians", 0)(lambda t: t[0, 0, 0]), r"jacobians: expected .*T.* found \[\]"),
    (at("jacobians", 0)(lambda t: t[:0]), r"jacobians: expected .*T.* found \[0, 4, 5\]"),
    (at("jacobians", 1)(Tensor.bfloat16), "jacobians: expected torch.float32 like parameter 1, found torch.bfloat16"),
    (at("jacobians", 1)(lambda t: t.to(META)), "jacobians: expected all on cpu, found meta for parameter 1"),
    (
        at("jacobians", 1)(Tensor.to_sparse),
        "jacobians: expected a dense tensor for parameter 1, found torch.sparse_coo",
    ),
    (
        at("parameters", 0)(Tensor.to_sparse),
        "parameters: expected a dense tensor for parameter 0, found torch.sparse_coo",
    ),
    (
        at("parameters", 1)(Tensor.half),
        "parameters: expected float32, bfloat16 or float64, found torch.float16 in parameter 1",
    ),
    (
        at("parameters", 0)(Tensor.long),
        "parameters: expected float32, bfloat16 or float64, found torch.int64 in parameter 0",
    ),
    (at("parameters", 1)(lambda t: t.to(META)), "parameters: expected all on cpu, found meta"),
    (at("parameters", 1)(lambda t: t[:1].expand(7)), "expected parameters .* found an expanded tensor"),
    (at("steps", 1)(lambda t: t[:2]), f"steps[1]: {SMALL} [2] torch.float32 on cpu"),
    (at("steps", 0)(Tensor.double), f"steps[0]: {SMALL} [3] torch.float64"),
    (at("steps", 0)(Tensor.long), f"steps[0]: {SMALL} [3] torch.int64"),
    (at("steps", 1)(lambda t: t.to(META)), f"steps[1]: {SMALL} [3] torch.float32 on meta"),
    (at("steps", 1)(lambda t: t.repeat_interleave(2)[::2]), r"steps\[1\]: expected .*not contiguous"),
    (at("steps", 1)(lambda t: t[:1].expand(3)), r"steps\[1\]: expected .*not contiguous"),
    (at("squares", 0)(Tensor.float), r"squares\[0\]: expected \[3\] torch.float64 .*found .*torch.float32"),
    (at("squares", 0)(lambda t: t[:, None]), r"squares\[0\]: expected \[3\] .*found \[3, 1\]"),
    (at("squares", 1)(lambda t: torch.stack([t, t], 1)[:, 0]), r"squares\[1\]: expected .*not contiguous"),
    ({"present": W}, "present: expected [3] torch.bool on cpu, contiguous, found [3] torch.float32"),
    ({"present": W[:2].bool()}, "present: expected [3] torch.bool on cpu, contiguous, found [2]"),
    ({"present": W.bool().to(META)}, "present: expected .* on cpu, .* on meta"),
    ({"present": torch.ones(3, 2).bool()[:, 0]}, "present: expected .*not contiguous"),
    ({"lr": torch.ones(2)}, "lr: expected a number or a tensor with one, found shape [2]"),
    ({"lr": torch.tensor(0.1, device=META)}, "lr: expected a tensor on cpu like the parameters, found meta"),
    (at("SECOND", 1)(), "SECOND: expected 6 tensors for 2 parameters and 3 tasks, found 3"),
    (at("SECOND", 1, 2)(), "SECOND: expected 3 tensors, one a task, for parameter 1, found 2"),
    (at("SECOND", 0, 1)(lambda t: t.mT), "SECOND: expected shape [4, 5] for parameter 0, found [5, 4]"),
    (
        at("SECOND", 1, 2)(Tensor.double),
        "SECOND: expected torch.float32 or torch.bfloat16, .* parameter 1, found torch.float64",
    ),
    (at("SECOND", 1, 2)(Tensor.bfloat16), "SECOND: expected .* alike for parameter 1, found torch.bfloat16"),
    (at("SECOND", 0, 0)(Tensor.half), ".*: expected torch.float32 or torch.bfloat16, alike for parameter 0, found"),
    (at("SECOND", 1, 0)(lambda t: t.to(META)), "SECOND: expected all on cpu, found meta for parameter 1"),
    (at("SECOND", 1, 0)(Tensor.to_sparse), "SECOND: expected a dense tensor for parameter 1, found torch.sparse_coo"),
    (at("SECOND", 1, 0)(lambda t: t[:1].expand(7)), "expected .*moments .* found an expanded tensor"),
]
SECOND = {
    "adatask_adam, amsgrad": "exp_avg_sqs",
    "adatask_rmsprop, centered, momentum": "square_avgs",
    "adatask_adagrad, adagrad": "state_sums",
}
#: Of values, which only the host looks at.
OF_VALUES: dict[str, list[tuple[Change, str]]] = {
    "regression_moments": [
        ({"features": put(X, (1, 2), torch.nan)}, "features: expected finite values, found nan at [1, 2]"),
        ({"mean": REGRESSION.mean * torch.inf}, "mean: expected finite.*"),
        ({"covariance": INDEFINITE}, IMPOSSIBLE),
    ],
    "binary_moments": [
        ({"covariance": TWISTED}, IMPOSSIBLE),
    ],
    "multiclass_moments": [
        ({"targets": put(CLASSES.targets, (2,), 3)}, "targets: .* from 0 to 2, .* found 3 at example 2"),
        ({"covariance": JOINT}, IMPOSSIBLE),
    ],
}


def renamed(change: Change, second: str) -> Change:
    def in_place(arguments: dict[str, Any]) -> None:
        arguments["SECOND"] = arguments[second]
        arguments.update(change) if isinstance(change, dict) else change(arguments)
        arguments[second] = arguments.pop("SECOND")

    return in_place


BAD = [
    *((op, *entry) for op, entries in WRONG.items() for entry in entries),
    *(
        (op, *entry)
        for op in ("upgrad", "dualproj", "mgda", "cagrad", "fairgrad", "imtlg", "pcgrad")
        for entry in OF_RULES
    ),
    *((op, *entry) for op in ("upgrad", "dualproj") for entry in OF_PREFERENCES),
    *((op, renamed(change, of), text.replace("SECOND", of)) for change, text in OF_STEPS for op, of in SECOND.items()),
]
BAD += [
    (op, {option: aligned(name, strided)}, f"out.{name}: {DENSE}, found torch.float64 on cpu")
    for op, option in (("align", "out"), ("merge", "result"))
    for name in ("weights", "singular_values", "transform")
]
BAD_VALUES = [(op, *entry) for op, entries in OF_VALUES.items() for entry in entries]


def refused(op: str, change: Change, message: str, mode: Any = None) -> None:
    call, right = GOOD[op]
    arguments = tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), right)
    arguments.update(change) if isinstance(change, dict) else change(arguments)
    if isinstance(mode, FakeTensorMode):
        arguments = tree_map_only(Tensor, mode.from_tensor, arguments)
    every = tree_leaves([value for value in arguments.values() if value is not None])
    every = [t for t in every if type(t) is Tensor and t.device != META]
    before = [t.clone() for t in every]
    # What has brackets and no pattern is meant to the letter.
    pattern = message if ".*" in message or "\\" in message else re.escape(message)
    with (
        pytest.raises((RuntimeError, ValueError), match=f"^{op.partition(',')[0]}: {pattern}") as error,
        mode or nullcontext(),
    ):
        call(**arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
    for tensor, old in zip(every, before):
        same = (tensor.to_dense() == old.to_dense()) | old.to_dense().isnan()
        assert same.all(), "changed before the error"


@pytest.mark.parametrize("index", range(len(BAD)), ids=lambda i: f"{BAD[i][0]}, {BAD[i][2][:40]}")
def test_errors_name_argument_expected_and_found(index: int) -> None:
    """Eagerly and in the operator that is traced, to the word."""
    op, change, message = BAD[index]
    refused(op, change, message)
    if "dense tensor" not in message:  # torch itself gives an operator no sparse ones
        refused(op, change, message, Names())
        if not any(
            word in message for word in ("meta", "expanded")
        ):  # what no fake tensor is, or the kernel alone sees
            refused(op, change, message, FakeTensorMode())


@pytest.mark.parametrize("index", range(len(BAD_VALUES)))
def test_errors_of_values_name_argument_expected_and_found(index: int) -> None:
    refused(*BAD_VALUES[index])
    refused(*BAD_VALUES[index], Names())
