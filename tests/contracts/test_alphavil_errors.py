"""What AlphaVIL refuses: one line that says which argument, what was expected, what was found and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from tests.support.bounds import contents, hushed, one_line, random_state, same_random_state, same_values
from tests.support.nets import SGD, Case, NamedBatch, Unsized, epoch, named_batches

pytestmark = pytest.mark.usefixtures("one_thread")


def make(case: Case, **changed: Any) -> AlphaVIL:
    arguments = {"model": case.model, "tasks": case.tasks, "target": case.target, "make_optimizer": SGD, **changed}
    return AlphaVIL(**arguments)


def refused(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    one_line(error.value, "AlphaVIL: ", "expected", "found", *parts)
    assert len(str(error.value)) < 300


# ---- the constructor ------------------------------------------------------------------------------------------------

#: Arguments, and what the message has to name.
WRONG: list[tuple[str, Any, list[str]]] = [
    *(("model", v, ["model: "]) for v in (None, [], lambda x: x, nn.Linear, {"a": 1})),
    *(("tasks", v, ["tasks: "]) for v in (None, 3, {}, [], [None], ["size"], {"size": None}, {"size": (1, 2)}, "size")),
    *(("target", v, ["target: ", "'size', 'kind', 'marks'"]) for v in ("age", "", None, 3, -1, True, 1.0, ["size"])),
    ("target", "kind", ["'kind'", "target", "dev: ", "None"]),
    *(("make_optimizer", v, ["make_optimizer: ", "function"]) for v in (None, "sgd", 0.1, {"lr": 0.1})),
    *(("alpha_optimizer", v, ["alpha_optimizer: ", "function"]) for v in (None, "sgd", 0.1)),
    *(("alpha_epochs", v, ["alpha_epochs: "]) for v in (0, -1, 1.5, 2.0, True, None, "5", math.inf)),
    *(("subset", v, ["subset: "]) for v in (0, -3, 0.0, -0.1, 1.1, 2.0, math.nan, True, None, "half", [1], (0.1, 0.2))),
    *(("clip_alpha", v, ["clip_alpha: "]) for v in (0.5, "01", (1.0,), (0.0, 1.0, 2.0), [], {"low": 0})),
    *(("clip_alpha", v, ["clip_alpha: ", "1"]) for v in ((1.1, 2.0), (-1.0, 0.9), (2.0, 0.0), (math.nan, 2.0))),
    *(("clip_alpha", v, ["clip_alpha: "]) for v in ((None, 2.0), ("0", "2"), (0.0, math.nan))),
    *(("include_heads", v, ["include_heads: ", "own, none, all"]) for v in ("Own", "both", "", None, True, 1, ["own"])),
    *(("min_weight", v, ["min_weight: "]) for v in ("0", None, math.nan, 1.5, math.inf, [0.0])),
    *(
        ("delta_storage", v, ["delta_storage: ", "parameters, bfloat16, host, host-bfloat16"])
        for v in ("cpu", None, 16)
    ),
    *(("delta_storage", v, ["delta_storage: "]) for v in (torch.bfloat16, ["host"], "Host")),
]


@pytest.mark.parametrize(("name", "value", "parts"), WRONG, ids=lambda v: None if isinstance(v, list) else str(v)[:20])
def test_arguments(name: str, value: Any, parts: list[str]) -> None:
    case = Case()
    before, numbers = contents(case.model), random_state()
    with pytest.raises((ValueError, TypeError)) as error:
        make(case, **{name: value})
    refused(error, *parts)
    assert same_values(contents(case.model), before)
    assert same_random_state(random_state(), numbers)


def test_arguments_that_are_fine() -> None:
    """What a message must not refuse: lists for pairs, infinite bounds."""
    case = Case()
    for fine in (
        {"clip_alpha": [0, 2]},
        {"clip_alpha": (1, 1)},
        {"clip_alpha": (-math.inf, math.inf)},
        {"subset": np.float64(0.5)},
        {"min_weight": 0},
        {"target": 0},
        {"tasks": tuple(case.tasks.values()), "target": "0"},
        {"make_optimizer": torch.optim.SGD},
    ):
        make(case, **fine)


def optimizers() -> list[tuple[str, Any]]:
    p = nn.Parameter(torch.ones(1))
    return [(name, torch.optim.SGD([p], lr=0.1)) for name in ("make_optimizer", "alpha_optimizer")]


def test_optimizers_instead_of_functions() -> None:
    for name, optimizer in optimizers():
        with pytest.raises(TypeError) as error:
            make(Case(), **{name: optimizer})
        refused(error, f"{name}: ", "function", "SGD", "lambda")


def test_names_that_are_not_strings_or_one_and_the_same() -> None:
    """1 and "1"; 0 and 1 the other way round: nobody is dropped or taken for another."""
    case = Case()
    a, b = case.tasks["size"], case.tasks["kind"]
    for tasks in ({1: a, "1": b}, {1: a, 0: b}, {None: a}, {("a", "b"): a}):
        with pytest.raises((TypeError, ValueError)) as error:
            make(case, tasks=tasks, target=1)
        refused(error, "tasks: ")


#: Fields of a task, and what the message has to name.
FIELDS: list[tuple[str, Callable[[Case], Any], list[str]]] = [
    ("train", lambda c: iter(c.tasks["kind"].train), ["train: ", "iterated anew|iterate anew", "list"]),
    ("train", lambda c: (b for b in c.tasks["kind"].train), ["train: ", "generator", "list"]),
    ("train", lambda c: zip([1], [2]), ["train: ", "zip"]),
    ("train", lambda c: None, ["train: ", "None"]),
    ("train", lambda c: 3, ["train: ", "int"]),
    ("train", lambda c: torch.ones(3, 5), ["train: ", "Tensor"]),
    ("train", lambda c: "data.csv", ["train: ", "str"]),
    ("train", lambda c: torch.utils.data.TensorDataset(torch.ones(3)), ["train: ", "TensorDataset"]),
    ("train", lambda c: lambda: c.tasks["kind"].train, ["train: ", "function"]),
    ("dev", lambda c: iter([]), ["dev: ", "iterator"]),
    ("dev", lambda c: 5, ["dev: ", "int"]),
    ("loss", lambda c: None, ["loss: ", "None"]),
    ("loss", lambda c: "mse", ["loss: ", "str"]),
    ("loss", lambda c: torch.tensor(1.0), ["loss: ", "Tensor"]),
    ("head", lambda c: nn.Linear(3, 7), ["head: ", "[7, 3]", "not in"]),
    ("head", lambda c: [torch.ones(2, 9)], ["head: ", "[2, 9]", "not in"]),
    ("head", lambda c: "kind", ["head: ", "str"]),
    ("head", lambda c: ["heads.kind"], ["head: ", "str"]),
    ("head", lambda c: 1, ["head: ", "int"]),
    ("head", lambda c: [None], ["head: ", "None"]),
    ("head", lambda c: [c.model.heads["kind"]], ["head: ", "Linear"]),
    ("head", lambda c: c.model.heads["kind"].weight, ["head: ", "list|module"]),
    ("head", lambda c: c.model.heads["kind"].state_dict(), ["head: "]),
    ("head", lambda c: c.model.heads["kind"].named_parameters(), ["head: "]),
]


@pytest.mark.parametrize(("field", "value", "parts"), FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_fields_of_tasks(field: str, value: Any, parts: list[str]) -> None:
    """In the constructor of the task or of AlphaVIL, with the task's name."""
    case = Case()
    with pytest.raises((ValueError, TypeError)) as error:  # noqa: PT012
        case.change("kind", **{field: value(case)})
        case.vil()
    refused(error, "tasks: ", "'kind'")
    for part in parts:
        assert any(choice in str(error.value) for choice in part.split("|")), (part, str(error.value))


def test_models_with_nothing_to_train() -> None:
    case = Case()
    case.model.requires_grad_(False)
    with pytest.raises(ValueError, match="AlphaVIL: ") as error:
        case.vil()
    refused(error, "require gradients")
    case.model.heads["size"].requires_grad_(True)
    for include in ("own", "none"):
        with pytest.raises(ValueError, match="AlphaVIL: ") as error:
            case.vil(include_heads=include)
        refused(error)
    case.model.heads.requires_grad_(True)
    with pytest.raises(ValueError, match="include_heads") as error:
        case.vil(include_heads="none")
    refused(error, "own")
    case.vil(include_heads="own")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("storage", ["bfloat16", "host-bfloat16"])
def test_bfloat16_for_other_types(storage: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="delta_storage") as error:
        Case(dtype=dtype).vil(delta_storage=storage)
    refused(error, str(dtype), storage)


# ---- losses, data and optimizers: in a round ------------------------------------------------------------------------


def stays(case: Case, vil: AlphaVIL, error: type[BaseException] | tuple[type[BaseException], ...], *parts: str) -> None:
    """The message, twice, and nothing has changed."""
    before, weights = contents(case.model), vil.task_weights.clone()
    for _ in range(2):
        with pytest.raises(error, match="AlphaVIL: ") as raised, hushed():
            vil.epoch()
        refused(raised, *parts)
        assert same_values(contents(case.model), before)
        assert torch.equal(vil.task_weights, weights)
        assert all(p.grad is None for p in case.model.parameters())
        assert all(module.training for module in case.model.modules())
        assert vil.rounds == 0
        assert vil.last is None


RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda v: (v, {"accuracy": 1.0}), "tuple"),
    "dict": (lambda v: {"loss": v}, "dict"),
    "float": (lambda v: v.item(), "float"),
    "None": (lambda v: None, "NoneType"),
    "vector": (lambda v: v.expand(3), "[3]"),
    "matrix": (lambda v: v.expand(2, 1), "[2, 1]"),
    "nothing": (lambda v: v.expand(0), "[0]"),
    "numpy": (lambda v: v.detach().numpy(), "ndarray"),
    "integer": (lambda v: v.long(), "torch.int64"),
    "complex": (lambda v: v + 0j, "torch.complex64"),
}


@pytest.mark.parametrize("where", ["training", "development"])
@pytest.mark.parametrize("kind", RETURNS)
def test_what_a_loss_returns(kind: str, where: str) -> None:
    case = Case()
    name = "kind" if where == "training" else "size"
    loss, (turn, found) = case.tasks[name].loss, RETURNS[kind]
    case.change(name, loss=lambda m, b: turn(loss(m, b)) if m.training == (where == "training") else loss(m, b))
    stays(case, case.vil(), TypeError, f"'{name}'", "loss: ", "scalar", found)


def test_losses_of_one_element() -> None:
    """[1] and [1, 1] are scalars enough."""
    case = Case()
    for name, shape in (("size", (1,)), ("kind", (1, 1))):
        loss = case.tasks[name].loss
        case.change(name, loss=lambda m, b, of=loss, to=shape: of(m, b).reshape(to))
    assert epoch(case.vil()).kept == "search"


@pytest.mark.parametrize("where", ["training", "development"])
def test_losses_without_a_derivative(where: str) -> None:
    case = Case()
    loss = case.tasks["size"].loss
    case.change("size", loss=lambda m, b: loss(m, b).detach() if m.training == (where == "training") else loss(m, b))
    stays(case, case.vil(), TypeError, "'size'", "loss: ", "detach()")


def test_rounds_under_no_grad() -> None:
    case = Case()
    vil = case.vil()
    with torch.no_grad():
        stays(case, vil, TypeError, "loss: ", "no_grad()")
    assert epoch(vil).kept == "search"


@pytest.mark.parametrize("what", ["train", "dev"])
@pytest.mark.parametrize("kind", ["list", "tuple", "unsized", "loader"])
def test_nothing_in_the_data(kind: str, what: str) -> None:
    """In the constructor, or when it is iterated."""
    empty: Any = {"list": [], "tuple": (), "unsized": Unsized([])}.get(kind)
    if kind == "loader":
        empty = torch.utils.data.DataLoader([], batch_size=2)  # type: ignore[var-annotated]
    case = Case()
    case.change("size", **{what: empty})
    try:
        vil = case.vil()
    except ValueError as error:
        one_line(error, "AlphaVIL: ", "'size'", f"{what}: ", "expected", "found none")
    else:
        stays(case, vil, ValueError, "'size'", f"{what}: ", "at least one batch", "none")


def test_data_that_ends_after_one_round() -> None:
    """An iterable whose second pass has nothing, as files that were read: in words, and only the round is lost."""

    class Once:
        def __init__(self, of: list[NamedBatch]):
            self.of = of

        def __iter__(self) -> Any:
            found, self.of = self.of, []
            return iter(found)

    case = Case()
    case.change("kind", train=Once(named_batches("kind", 3)))
    vil = case.vil()
    epoch(vil)
    before = contents(case.model)
    with pytest.raises(ValueError, match="AlphaVIL: ") as error:
        vil.epoch()
    refused(error, "'kind'", "train: ")
    assert same_values(contents(case.model), before)


@pytest.mark.parametrize("name", ["make_optimizer", "alpha_optimizer"])
def test_functions_that_return_no_optimizer(name: str) -> None:
    case = Case()
    for value in (None, 0.1, SGD):
        stays(case, case.vil(**{name: lambda ps, value=value: value}), TypeError, f"{name}: ")


def test_inner_optimizers_that_need_a_closure() -> None:
    case = Case()
    vil = case.vil(make_optimizer=lambda ps: torch.optim.LBFGS(ps))
    stays(case, vil, (TypeError, ValueError), "make_optimizer: ", "LBFGS", "closure")


def test_errors_of_the_users_own() -> None:
    """They come through as they are."""
    case = Case()
    loss = case.tasks["marks"].loss

    def out_of_range(model: Any, batch: NamedBatch) -> Tensor:
        if model.training:
            raise IndexError("target 3 is out of bounds.")
        return loss(model, batch)

    case.change("marks", loss=out_of_range)
    before = contents(case.model)
    with pytest.raises(IndexError, match=r"^target 3 is out of bounds\.$"), hushed():
        case.vil().epoch()
    assert same_values(contents(case.model), before)
    case.change("marks", loss=lambda batch: loss(case.model, batch))  # of one argument
    with pytest.raises(TypeError, match="positional argument"), hushed():
        case.vil().epoch()
    assert same_values(contents(case.model), before)


def test_a_model_of_another_type_than_its_deltas() -> None:
    """model.double() between two rounds: the next round is in the new type, or says what is wrong."""
    case, wide = Case(), Case(dtype=torch.float64)
    vil = case.vil()
    epoch(vil)
    case.model.double()
    for name, task in list(case.tasks.items()):
        task.train[:] = wide.tasks[name].train  # type: ignore[index]
        if task.dev is not None:
            task.dev[:] = wide.tasks[name].dev  # type: ignore[index]
    before = contents(case.model)
    try:
        found = epoch(vil)
    except (RuntimeError, ValueError) as error:
        one_line(error, "expected", "found")
        assert same_values(contents(case.model), before)
    else:
        theta = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
        assert found.kept != "none"
        rounded = [n for n, p in theta.items() if torch.equal(p.float().double(), p) and not torch.equal(p, before[n])]
        assert not rounded
