"""The operator of the `adatask` stem: opcheck, torch.compile, fake tensors, errors in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtlgrad import ops, reference
from mtlgrad.ops import _native, adatask
from tests.support.adatask_cases import (
    KINDS,
    RULES,
    TYPES,
    State,
    assert_same,
    begin,
    call,
    exact,
    gradients,
    on,
    weights_of,
)
from tests.support.bounds import normal

EVERY_KIND = pytest.mark.parametrize("rule", KINDS)
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
SHAPES = [(4, 5), (2, 3, 4, 5), (0, 2), ()]


def laid_out(state: State, layout: str) -> State:
    """Copies, some of them not dense."""
    if layout == "transposed":
        return state.map(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone())
    if layout == "channels_last":
        return state.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone())
    if layout == "sliced":
        return state.map(lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t.clone())
    return state.clone()


def recorded(monkeypatch: pytest.MonkeyPatch, rule: str, state: State, jacobians: list[Tensor], **options: Any) -> Any:
    """The operator, and the arguments that it gets."""
    found: list[Any] = []
    name = f"adatask_{RULES[rule].op}"
    operation = getattr(adatask, name.removeprefix("adatask_").upper())
    with monkeypatch.context() as patch:
        patch.setattr(operation, "_directly", lambda _, arguments: found.append(operation._flat(arguments)))
        call(ops, RULES[rule], state, jacobians, **options)
    return getattr(torch.ops.mtlgrad, name).default, found[0]


@EVERY_KIND
def test_opcheck(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all that what the schema says is changed is changed, and nothing else."""
    present = {"present": torch.tensor([True, False, True]), "keys": [1, 2, 3, 2**40]}
    for layout in ("dense", "transposed", "channels_last", "sliced"):
        for options in ({}, present):
            state = laid_out(begin(RULES[rule], SHAPES, 3, TYPES), layout)
            operator, arguments = recorded(monkeypatch, rule, state, gradients(state, 3), **options)
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@EVERY_KIND
def test_opcheck_with_sizes_unknown(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch.compile(dynamic=True)."""
    state = laid_out(begin(RULES[rule], SHAPES[:2], 3, TYPES[1:2]), "channels_last")
    present = torch.tensor([True, False, True])
    operator, arguments = recorded(monkeypatch, rule, state, gradients(state, 3), present=present)
    torch.library.opcheck(operator, arguments, test_utils="test_aot_dispatch_dynamic")


@EVERY_RULE
def test_fake_tensors(rule: str) -> None:
    """Traced without any memory; arguments that do not fit are refused there, too."""
    with FakeTensorMode():
        state = begin(RULES[rule], [(4, 5), (1000,)], 3).map(torch.empty_like)
        state.steps, state.squares = [torch.empty(3)] * 2, [torch.empty(3, dtype=torch.float64)] * 2
        jacobians = [torch.empty(3, *p.shape) for p in state.parameters]
        call(ops, RULES[rule], state, jacobians)
        call(ops, RULES[rule], state, jacobians, present=torch.empty(3, dtype=torch.bool), keys=[1, 2])
        with pytest.raises(RuntimeError, match=r"adatask_\w+: jacobians: expected shape \[3, 4, 5\] for parameter 0"):
            call(ops, RULES[rule], state, [torch.empty(3, 5, 4), jacobians[1]])


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@EVERY_KIND
def test_compiles_without_graph_breaks(rule: str, backend: str) -> None:
    """The step between other work on the same tensors, which must see it done."""
    torch.compiler.reset()
    shapes = [(4, 5), (2, 3, 4, 5)]
    state = laid_out(begin(RULES[rule], shapes, 3, TYPES[:2]), "channels_last")
    jacobians, lr = gradients(state, 3), torch.tensor(0.02)
    mask = torch.tensor([True, False, True])

    def step(state: State, jacobians: list[Tensor], lr: Tensor, mask: Tensor) -> list[Tensor]:
        before = [p * 2 for p in state.parameters]
        doubled = [j * 2 for j in jacobians]
        call(ops, RULES[rule], state, doubled, task_weights=weights_of(3), present=mask, keys=[3, 4], lr=lr)
        return [*before, *(p + 1 for p in state.parameters), *(s + 0 for s in state.steps)]

    eager, compiled = state.clone(), state.clone()
    run = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        want, got = step(eager, jacobians, lr, mask), run(compiled, jacobians, lr, mask)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for name, tensor in compiled.named().items():
            torch.testing.assert_close(
                tensor, eager.named()[name], rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
        assert not torch.equal(compiled.parameters[0], state.parameters[0])


@EVERY_KIND
def test_under_autocast(rule: str) -> None:
    state = begin(RULES[rule], [(40,)], 3)
    inside, outside = state.clone(), state.clone()
    call(ops, RULES[rule], outside, gradients(state, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(ops, RULES[rule], inside, gradients(state, 3))
    assert_same(inside, outside)


@EVERY_RULE
def test_without_kernels_the_reference_serves(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what the reference does, on a device that no kernel was built for."""
    for lr in (0.02, torch.tensor(0.02)):
        for options in ({}, {"present": torch.tensor([True, False, True]), "keys": [1, 2, 3, 4], "square_decay": 0.5}):
            state = begin(RULES[rule], SHAPES, 3, TYPES)
            jacobians, want = gradients(state, 3), state.clone()
            call(reference, RULES[rule], want, jacobians, task_weights=weights_of(3), lr=float(lr), **options)
            with monkeypatch.context() as patch:
                patch.setitem(_native.KERNELS, "cpu", None)
                call(ops, RULES[rule], state, jacobians, task_weights=weights_of(3), lr=lr, **options)
            assert_same(state, want)


@EVERY_KIND
def test_learning_rate_on_the_device(rule: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed to the kernel as a tensor, as under torch.compile and on CUDA."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        lr = torch.tensor(0.03125, dtype=dtype, device=device)
        state = begin(RULES[rule], [(40,), (3,)], 3)
        jacobians = [j.to(device) for j in gradients(state, 3)]
        number, tensor = state.to(device), state.to(device)
        call(ops, RULES[rule], number, jacobians, lr=0.03125)
        with monkeypatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda: True)
            call(ops, RULES[rule], tensor, jacobians, lr=lr)
        assert_same(tensor, number)


@pytest.mark.parametrize("rule", list(RULES))
def test_other_work_sees_what_was_changed(rule: str) -> None:
    """Autograd refuses a graph whose tensors a step changed, as it does with torch.optim."""
    state = begin(RULES[rule], [(40,)], 3)
    changed = [*state.parameters, *state.steps]
    versions = [t._version for t in changed]
    leaf = state.parameters[0].requires_grad_()
    loss = leaf.square().sum()
    with torch.no_grad():
        call(ops, RULES[rule], state, gradients(state, 3))
    assert all(t._version > before for t, before in zip(changed, versions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- errors ----------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def arguments_of(rule: str) -> dict[str, Any]:
    """By name, of two parameters and three tasks; for `rule` all that there may be."""
    state = begin(RULES[rule], [(4, 5), (7,)], 3)
    found = {"parameters": state.parameters, "jacobians": gradients(state, 3), **state.moments, "steps": state.steps}
    if state.buffers:
        found["momentum_buffers"] = state.buffers
    found |= {"squares": state.squares, "keys": [1, 2], "task_weights": [1.0] * 3, "present": torch.ones(3).bool()}
    return {**found, **RULES[rule].settings}


def run(rule: str, arguments: dict[str, Any]) -> None:
    getattr(ops, f"adatask_{RULES[rule].op}")(**arguments)


def put(name: str, *at: int) -> Callable[[Callable[[Tensor], Any]], Change]:
    """Changes one tensor of a list."""

    def with_(change: Callable[[Tensor], Any]) -> Change:
        def in_place(arguments: dict[str, Any]) -> None:
            inner = arguments[name] = [list(x) if isinstance(x, list) else x for x in arguments[name]]
            for i in at[:-1]:
                inner = inner[i]
            inner[at[-1]] = change(inner[at[-1]])

        return in_place

    return with_


def drop(name: str, *at: int) -> Change:
    def in_place(arguments: dict[str, Any]) -> None:
        inner = arguments[name] = [list(x) if isinstance(x, list) else x for x in arguments[name]]
        for i in at[:-1]:
            inner = inner[i]
        del inner[at[-1]]

    return in_place


def set_(**values: Any) -> Change:
    return lambda arguments: arguments.update(values)


EVERYWHERE = ["amsgrad", "centered, momentum", "adagrad"]
SECOND = {"amsgrad": "exp_avg_sqs", "centered, momentum": "square_avgs", "adagrad": "state_sums"}
#: Of all rules: what is wrong, and what the message says after the operation. SECOND stands for a list of moments.
WRONG: dict[str, tuple[Change, str]] = {
    "jacobians, number": (drop("jacobians", 1), "jacobians: expected 2 tensors, one a parameter, found 1"),
    "steps, number": (drop("steps", 0), "steps: expected 2 tensors, one a parameter, found 1"),
    "squares, number": (drop("squares", 0), "squares: expected 2 tensors, one a parameter, found 1"),
    "keys, number": (set_(keys=[1]), "keys: expected 2, one a parameter, found 1"),
    "keys, none": (set_(keys=[]), "keys: expected 2, one a parameter, found 0"),
    "weights, number": (set_(task_weights=[1.0, 2.0]), "task_weights: expected 3 .*found 2"),
    "weights, none": (set_(task_weights=[]), "task_weights: expected 3 .*found 0"),
    "jacobians, shape": (
        put("jacobians", 0)(lambda t: t.mT),
        "jacobians: expected shape [3, 4, 5] for parameter 0, found [3, 5, 4]",
    ),
    "jacobians, tasks": (
        put("jacobians", 1)(lambda t: t[:2]),
        "jacobians: expected shape [3, 7] for parameter 1, found [2, 7]",
    ),
    "jacobians, no tasks": (put("jacobians", 0)(lambda t: t[0, 0, 0]), r"jacobians: expected .*T.* found \[\]"),
    "jacobians, none": (put("jacobians", 0)(lambda t: t[:0]), r"jacobians: expected .*T.* found \[0, 4, 5\]"),
    "jacobians, type": (
        put("jacobians", 1)(Tensor.bfloat16),
        "jacobians: expected torch.float32 like parameter 1, found torch.bfloat16",
    ),
    "jacobians, device": (
        put("jacobians", 1)(lambda t: t.to("meta")),
        "jacobians: expected all on cpu, found meta for parameter 1",
    ),
    "jacobians, sparse": (
        put("jacobians", 1)(Tensor.to_sparse),
        "jacobians: expected a dense tensor for parameter 1, found torch.sparse_coo",
    ),
    "parameters, sparse": (
        put("parameters", 0)(Tensor.to_sparse),
        "parameters: expected a dense tensor for parameter 0, found torch.sparse_coo",
    ),
    "parameters, half": (
        put("parameters", 1)(Tensor.half),
        "parameters: expected float32, bfloat16 or float64, found torch.float16 in parameter 1",
    ),
    "parameters, integers": (
        put("parameters", 0)(Tensor.long),
        "parameters: expected float32, bfloat16 or float64, found torch.int64 in parameter 0",
    ),
    "parameters, device": (put("parameters", 1)(lambda t: t.to("meta")), "expected all on cpu, found meta"),
    "parameters, expanded": (
        put("parameters", 1)(lambda t: t[:1].expand(7)),
        "expected parameters .* found an expanded tensor",
    ),
    "steps, shape": (
        put("steps", 1)(lambda t: t[:2]),
        "steps[1]: expected [3] torch.float32 on cpu, contiguous, found [2] torch.float32 on cpu",
    ),
    "steps, type": (
        put("steps", 0)(Tensor.double),
        r"steps\[0\]: expected \[3\] torch.float32 .*found \[3\] torch.float64",
    ),
    "steps, integers": (
        put("steps", 0)(Tensor.long),
        r"steps\[0\]: expected \[3\] torch.float32 .*found \[3\] torch.int64",
    ),
    "steps, device": (put("steps", 1)(lambda t: t.to("meta")), r"steps\[1\]: expected .*cpu.* found .* on meta"),
    "steps, strided": (
        put("steps", 1)(lambda t: t.repeat_interleave(2)[::2]),
        r"steps\[1\]: expected .*not contiguous",
    ),
    "steps, expanded": (put("steps", 1)(lambda t: t[:1].expand(3)), r"steps\[1\]: expected .*not contiguous"),
    "squares, type": (
        put("squares", 0)(Tensor.float),
        r"squares\[0\]: expected \[3\] torch.float64 .*found .*torch.float32",
    ),
    "squares, shape": (put("squares", 0)(lambda t: t[:, None]), r"squares\[0\]: expected \[3\] .*found \[3, 1\]"),
    "squares, strided": (
        put("squares", 1)(lambda t: torch.stack([t, t], 1)[:, 0]),
        r"squares\[1\]: expected .*not contiguous",
    ),
    "present, type": (
        set_(present=torch.ones(3)),
        "present: expected [3] torch.bool on cpu, contiguous, found [3] torch.float32",
    ),
    "present, shape": (
        set_(present=torch.ones(2).bool()),
        "present: expected [3] torch.bool on cpu, contiguous, found [2]",
    ),
    "present, device": (set_(present=torch.ones(3).bool().to("meta")), "present: expected .* on cpu, .* on meta"),
    "present, strided": (set_(present=torch.ones(3, 2).bool()[:, 0]), "present: expected .*not contiguous"),
    "lr, two": (set_(lr=torch.ones(2)), "lr: expected a number or a tensor with one, found shape [2]"),
    "lr, device": (
        set_(lr=torch.tensor(0.1, device="meta")),
        "lr: expected a tensor on cpu like the parameters, found meta",
    ),
    "moments, number": (drop("SECOND", 1), "SECOND: expected 6 tensors for 2 parameters and 3 tasks, found 3"),
    "moments, tasks": (drop("SECOND", 1, 2), "SECOND: expected 3 tensors, one a task, for parameter 1, found 2"),
    "moments, shape": (
        put("SECOND", 0, 1)(lambda t: t.mT),
        "SECOND: expected shape [4, 5] for parameter 0, found [5, 4]",
    ),
    "moments, type": (
        put("SECOND", 1, 2)(Tensor.double),
        "SECOND: expected torch.float32 or torch.bfloat16, .* parameter 1, found torch.float64",
    ),
    "moments, mixed": (
        put("SECOND", 1, 2)(Tensor.bfloat16),
        "SECOND: expected .* alike for parameter 1, found torch.bfloat16",
    ),
    "moments, half": (
        put("SECOND", 0, 0)(Tensor.half),
        "expected torch.float32 or torch.bfloat16, alike for parameter 0, found",
    ),
    "moments, device": (
        put("SECOND", 1, 0)(lambda t: t.to("meta")),
        "SECOND: expected all on cpu, found meta for parameter 1",
    ),
    "moments, sparse": (
        put("SECOND", 1, 0)(Tensor.to_sparse),
        "SECOND: expected a dense tensor for parameter 1, found torch.sparse_coo",
    ),
    "moments, expanded": (
        put("SECOND", 1, 0)(lambda t: t[:1].expand(7)),
        "expected .*moments .* found an expanded tensor",
    ),
}
#: Of one rule.
WRONG_HERE: dict[str, tuple[str, Change, str]] = {
    "amsgrad": (
        "amsgrad",
        drop("max_exp_avg_sqs", 1),
        "max_exp_avg_sqs: expected 6 tensors for 2 parameters and 3 tasks, found 3",
    ),
    "amsgrad, type": (
        "amsgrad",
        put("max_exp_avg_sqs", 0, 1)(Tensor.bfloat16),
        "max_exp_avg_sqs: expected .* alike for parameter 0, found",
    ),
    "first": ("adam", drop("exp_avgs", 0), "exp_avgs: expected 6 tensors for 2 parameters and 3 tasks, found 3"),
    "first, shape": (
        "adam",
        put("exp_avgs", 1, 1)(lambda t: t[1:]),
        r"exp_avgs: expected shape \[7\] for parameter 1, found \[6\]",
    ),
    "first, type": (
        "adam",
        put("exp_avgs", 1, 1)(Tensor.bfloat16),
        "exp_avgs: expected .* alike for parameter 1, found torch.bfloat16",
    ),
    "mean": ("centered", drop("grad_avgs", 0), "grad_avgs: expected 6 tensors for 2 parameters and 3 tasks, found 3"),
    "mean, tasks": (
        "centered",
        drop("grad_avgs", 0, 0),
        "grad_avgs: expected 3 tensors, one a task, for parameter 0, found 2",
    ),
    "buffers": (
        "momentum",
        drop("momentum_buffers", 0),
        "momentum_buffers: expected 2 tensors, one a parameter, found 1",
    ),
    "buffers, none": (
        "momentum",
        set_(momentum_buffers=None),
        "momentum_buffers: expected one a parameter for momentum=0.6, found none",
    ),
    "buffers, type": (
        "momentum",
        put("momentum_buffers", 1)(Tensor.bfloat16),
        "momentum_buffers: expected .* parameter 1, found torch.bfloat16",
    ),
    "buffers, shape": (
        "momentum",
        put("momentum_buffers", 0)(lambda t: t.mT),
        r"momentum_buffers: expected shape \[4, 5\] .* found \[5, 4\]",
    ),
    "buffers, expanded": (
        "momentum",
        put("momentum_buffers", 1)(lambda t: t[:1].expand(7)),
        "expected .*moments .* found an expanded tensor",
    ),
}


def check_refused(rule: str, change: Change, message: str) -> None:
    arguments = arguments_of(rule)
    change(arguments)
    every = _tensors(arguments)
    before = [t.clone() for t in every]
    # What has brackets and no pattern is meant to the letter.
    pattern = message if ".*" in message or "\\" in message else re.escape(message)
    with pytest.raises(RuntimeError, match=f"^adatask_{RULES[rule].op}: .*{pattern}") as error:
        run(rule, arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
    for tensor, old in zip(every, before):
        same = tensor.device.type == "meta" or torch.equal(tensor.to_dense(), old.to_dense())
        assert same, "changed before the error"


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return [t for a in arguments for t in _tensors(a)] if isinstance(arguments, list) else []


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_name_argument_expected_and_found(name: str) -> None:
    for rule in EVERYWHERE:
        change, message = WRONG[name]

        def renamed(arguments: dict[str, Any], rule: str = rule, change: Change = change) -> None:
            arguments["SECOND"] = arguments[SECOND[rule]]
            change(arguments)
            arguments[SECOND[rule]] = arguments.pop("SECOND")

        check_refused(rule, renamed, message.replace("SECOND", SECOND[rule]))


@pytest.mark.parametrize("name", list(WRONG_HERE))
def test_errors_of_one_rule(name: str) -> None:
    check_refused(*WRONG_HERE[name])


def test_doubles_want_doubles() -> None:
    state = begin(RULES["adam"], [(7,)], 3, [(torch.float64, torch.float32)])
    with pytest.raises(
        RuntimeError, match=r"adatask_adam: exp_avgs: expected torch.float64, alike for parameter 0, found"
    ):
        call(ops, RULES["adam"], state, gradients(state, 3))


def test_as_many_tasks_as_a_kernel_takes(device: str) -> None:
    """64 on a device, any number on the host; one more is refused before anything is changed, or done right."""
    for tasks in (64, 65):
        for rule in ("amsgrad", "adagrad"):
            state = begin(RULES[rule], [(5,)], tasks)
            jacobians, want = gradients(state, tasks), state.to(device)
            got = state.to(device)
            try:
                call(ops, RULES[rule], got, [j.to(device) for j in jacobians])
            except (RuntimeError, ValueError) as error:
                assert tasks == 65
                assert re.match(r"adatask.*64 tasks", str(error))  # noqa: PT017
                assert_same(got, want)
                continue
            right = exact(RULES[rule], state, jacobians).state.parameters[0]
            assert (got.parameters[0].cpu() - right).abs().max() < 1e-4


def test_the_schema_says_what_changes() -> None:
    """torch.compile goes by it."""
    moments = {
        "adam": {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"},
        "rmsprop": {"square_avgs", "grad_avgs", "momentum_buffers"},
        "adagrad": {"state_sums"},
    }
    for rule, own in moments.items():
        schema = getattr(torch.ops.mtlgrad, f"adatask_{rule}").default._schema
        changed = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert changed == {"parameters", *own, "steps", "squares"}


def test_keys_may_be_any_number_of_64_bits(device: str) -> None:
    """One that differs in any of its bits gives other decisions."""
    state = begin(RULES["adam"], [(400,)], 1, [TYPES[1]])
    jacobians = [j.to(device) for j in gradients(state, 1)]
    seen = []
    for key in (0, 1, 2**31, 2**32, 2**62, -1, -(2**62), 2**63 - 1):
        got, eager = state.to(device), state.clone()
        call(ops, RULES["adam"], got, jacobians, **on({"keys": [key]}, device))
        call(reference, RULES["adam"], eager, gradients(state, 1), keys=[key])
        assert (got.moments["exp_avgs"][0][0].cpu() != eager.moments["exp_avgs"][0][0]).sum() <= 2
        seen.append(got.moments["exp_avgs"][0][0].cpu())
    for i, a in enumerate(seen):
        assert all((a != b).float().mean() > 0.1 for b in seen[:i])


def test_calls_do_not_share_anything(device: str) -> None:
    """Two optimizers in turn, as if each were alone."""
    one, two = (begin(RULES["momentum"], [(50,)], 2, seed=s).to(device) for s in (1, 2))
    alone = [one.clone(), two.clone()]
    jacobians = [normal(3, 2, 50).float().to(device)]
    for state in alone:
        for _ in range(2):
            call(ops, RULES["momentum"], state, jacobians)
    for _ in range(2):
        for state in (one, two):
            call(ops, RULES["momentum"], state, jacobians)
    assert_same(one, alone[0])
    assert_same(two, alone[1])
