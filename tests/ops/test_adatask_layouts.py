"""AdaTask's steps on every backend: tensors however they lie, the same bits every time, stochastic rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from mtlgrad.reference.adatask import round_stochastically
from tests.support.adatask_cases import (
    EVERY_RULE,
    HALF,
    KINDS,
    NAMES,
    RULES,
    SINGLE,
    TYPES,
    Rule,
    State,
    assert_same,
    begin,
    call,
    check,
    exact,
    gradients,
    step,
    weights_of,
)

# ---- layouts ---------------------------------------------------------------------------------------------------------

GUARD = 7.0


def _padded(t: Tensor, dim: int) -> Tensor:
    """Beside a neighbour."""
    return torch.cat([t, torch.full_like(t, GUARD)], dim).narrow(dim, 0, t.shape[dim])


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), GUARD), t.reshape(-1), t.new_full((3,), GUARD)])[1:-3].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t.clone(memory_format=torch.contiguous_format),
    "sliced": lambda t: _padded(t, -1),
    "sliced rows": lambda t: _padded(t, -4),
    "every other": lambda t: torch.stack([t, torch.full_like(t, GUARD)], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "permuted": lambda t: t.movedim(-2, 0).contiguous().movedim(0, -2),
    "channels_last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "channels_last, offset": lambda t: _offset(t.movedim(-3, -1).contiguous()).movedim(-1, -3),
    "offset": _offset,
}
OF_JACOBIANS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "tasks last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other row": lambda t: torch.stack([t, torch.full_like(t, GUARD)], 1).flatten(0, 1)[::2],
    "flipped": lambda t: torch.stack(list(t)[::-1]).as_strided(t.shape, t.stride()).flip(0),
    "one row": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1, :1, :1].expand_as(t),
}


def around(tensor: Tensor) -> Tensor:
    """The elements of the memory behind a view that are not in the view."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    inside = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())[~inside]


def lay(state: State, parameters: str, moments: str) -> State:
    laid = state.map(LAYOUTS[moments])
    laid.parameters = [LAYOUTS[parameters](q) for q in state.parameters]
    return laid


@pytest.mark.parametrize("types", [SINGLE, HALF, TYPES[2]], ids=lambda pair: f"{NAMES[pair[0]]}-{NAMES[pair[1]]}")
@pytest.mark.parametrize("rule", KINDS)
def test_layouts(rule: str, types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """The results of dense tensors in any layout, written where the tensors lie and nowhere else."""
    state = begin(RULES[rule], [(2, 3, 5, 4)], 3, [types]).to(device)
    jacobians = [j.to(device) for j in gradients(state.to("cpu"), 3)]
    cases = [(name, name, name) for name in LAYOUTS]
    cases += [(name, "dense", "dense") for name in LAYOUTS] + [("channels_last", name, name) for name in LAYOUTS]
    cases += [("dense", name, "dense") for name in LAYOUTS]
    cases += [(name, "dense", other) for name in ("dense", "channels_last") for other in OF_JACOBIANS]
    for parameters, moments, rows in cases:
        laid, given = lay(state, parameters, moments), [OF_JACOBIANS[rows](j) for j in jacobians]
        want = state.clone()
        call(ops, RULES[rule], want, [g.contiguous() for g in given])
        before = [(t, around(t).clone()) for t in (*laid.parameters, *laid.buffers, *_moments(laid))]
        copies = [(g, g.clone()) for g in given]
        where = [(t, t.data_ptr(), t.stride()) for t, _ in before]
        call(ops, RULES[rule], laid, given)
        for t, outside in before:
            assert torch.equal(around(t), outside), (parameters, moments, rows)
        assert all(torch.equal(g, c) for g, c in copies)
        assert all(t.data_ptr() == at and t.stride() == stride for t, at, stride in where)
        assert torch.allclose(laid.squares[0], want.squares[0], rtol=1e-6)
        laid.squares, want.squares = [], []
        assert_same(laid, want, f"{parameters}, {moments}, {rows}")


def _moments(state: State) -> list[Tensor]:
    return [m for lists in state.moments.values() for row in lists for m in row]


@pytest.mark.parametrize("size", [1, 5, 33, 1000])
def test_unaligned(size: int, device: str) -> None:
    """Any of the tensors at an address that is no multiple of a vector's: the same bits."""
    for types in TYPES:
        state = begin(RULES["centered, momentum"], [(size,)], 2, [types]).to(device)
        jacobians = [j.to(device) for j in gradients(state.to("cpu"), 2)]
        want = state.clone()
        call(ops, RULES["centered, momentum"], want, jacobians)
        for moved in range(5):
            laid = state.clone()
            given = [_offset(j) if moved == 0 else j for j in jacobians]
            if moved == 1:
                laid.parameters = [_offset(q) for q in laid.parameters]
            elif moved == 2:
                laid.buffers = [_offset(b) for b in laid.buffers]
            elif moved > 2:
                row = laid.moments[("square_avgs", "grad_avgs")[moved - 3]][0]
                row[1] = _offset(row[1])
            call(ops, RULES["centered, momentum"], laid, given)
            assert torch.allclose(laid.squares[0], want.squares[0], rtol=1e-6)
            laid.squares = want.squares
            assert_same(laid, want, f"{types} {moved}")
            assert all((around(t) == GUARD).all() for t in (*laid.parameters, *laid.buffers, *_moments(laid), *given))


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", KINDS)
def test_threads_do_not_change_a_bit(rule: str) -> None:
    state = begin(RULES[rule], [(70_000,), (333,), (50_000,)], 2, [SINGLE, HALF])
    jacobians = gradients(state, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step(rule, state, jacobians, keys=[1, 2, 3]))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("rule", KINDS)
def test_same_bits_every_time(rule: str, device: str) -> None:
    """A training resumed from a copy of its state goes on as it would have."""
    state = begin(RULES[rule], [(3000,), (33,)], 2, [HALF, TYPES[3]])
    results = []
    for _ in range(2):
        now = state
        for k in range(2):
            now = step(rule, now, gradients(state, 2, seed=k), device, keys=[5, 6])
        results.append(now)
    assert_same(results[1], results[0])


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers below and above float64 numbers, in float64; the same where it is one."""
    nearest = value.bfloat16()
    bits = nearest.view(torch.int16)
    away = torch.where(nearest == 0, torch.where(value > 0, 1, -32767), bits + 1).short().view(torch.bfloat16).double()
    toward = (bits - 1).view(torch.bfloat16).double()
    near = nearest.double()
    other = torch.where(value.abs() > near.abs(), away, toward)
    other = torch.where(value == near, near, other)
    return torch.minimum(near, other), torch.maximum(near, other)


@EVERY_RULE
def test_stochastic_rounding_goes_to_a_neighbour_without_bias(rule: str, device: str) -> None:
    """All moments of many elements, with several keys from the same state: the mean error is zero, and every choice has
    the probability that makes it so."""
    size, tasks = (4000, 2) if device == "cpu" else (100_000, 2)
    state = begin(RULES[rule], [(size,)], tasks, [HALF])
    jacobians = gradients(state, tasks)
    errors: dict[str, list[Tensor]] = {}
    for key in range(4):
        found = exact(RULES[rule], state, jacobians)
        want, terms = found.state.named(), found.terms
        got = step(rule, state, jacobians, device, keys=[key * 977 - 5])
        for name, tensor in got.named().items():
            if tensor.dtype != torch.bfloat16:
                continue
            below, above = neighbours(want[name])
            # In float32 a number may lie on the other side of a bfloat16 one.
            slack, value = 2.0**-21 * terms[name], tensor.double()
            lowest, highest = neighbours(want[name] - slack)[0], neighbours(want[name] + slack)[1]
            assert ((value >= lowest) & (value <= highest)).all(), name
            inside = above > below
            share = ((want[name] - below) / (above - below))[inside]
            up = ((value - below) / (above - below))[inside]
            sigma = (share * (1 - share)).clamp_min(1e-12).sqrt()
            errors.setdefault(name, []).append((up - share) / sigma.pow(2).mean().sqrt())
    for name, all_ in errors.items():
        z = torch.cat(all_)
        assert abs(float(z.mean())) <= 5 / math.sqrt(len(z)), name
        # Its variance, too: of independent choices.
        assert abs(float(z.square().mean()) - 1) <= 0.1, name


@EVERY_RULE
def test_kernel_and_reference_round_alike(rule: str, device: str) -> None:
    """The same random bits for every element; only an ulp of the float32 number may tip the scale."""
    for types in ([HALF], [TYPES[3]], [SINGLE, TYPES[3], HALF]):
        state = begin(RULES[rule], [(3, 700), (90,), (80,)], 3, types)
        jacobians, keys = gradients(state, 3), [7, 2**40 + 12345, -(2**62)]
        got = step(rule, state, jacobians, device, keys=keys, task_weights=weights_of(3))
        eager = state.clone()
        call(reference, RULES[rule], eager, jacobians, keys=keys, task_weights=weights_of(3))
        for name, tensor in got.named().items():
            if tensor.dtype != torch.bfloat16:
                continue
            other = eager.named()[name]
            different = int((tensor != other).sum())
            # An ulp is 2^-16 of the gap between bfloat16 numbers; of the errors, a few.
            assert different <= 2 + 8 * 2.0**-16 * tensor.numel() * 16, (name, different)
        check(rule, state, jacobians, device, keys=keys)


@pytest.mark.parametrize("parameters", list(LAYOUTS))
@pytest.mark.parametrize("moments", ["dense", "channels_last", "sliced"])
def test_kernel_and_reference_count_elements_alike(parameters: str, moments: str, device: str) -> None:
    for rule in ("adam", "momentum"):
        state = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]), parameters, moments)
        jacobians = gradients(state, 2)
        if device == "cuda":
            got = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]).to(device), parameters, moments)
            call(ops, RULES[rule], got, [j.to(device) for j in jacobians], keys=[3])
        else:
            got = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]), parameters, moments)
            call(ops, RULES[rule], got, jacobians, keys=[3])
        call(reference, RULES[rule], state, jacobians, keys=[3])
        for a, b in zip(_moments(got) + got.buffers, _moments(state) + state.buffers):
            assert int((a.cpu() != b).sum()) <= 2, rule


def test_exact_values_stay(device: str) -> None:
    """What bfloat16 has is not rounded, whatever the random bits: moments that a step multiplies by powers of two."""
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.5, 0.5), "lr": 0.1})
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = values[(values.abs() > 1e-30) & (values.abs() < 1e30)]
    values = values[:: 1 if device == "cpu" else 7]
    state = State(
        [torch.zeros(len(values))],
        {"exp_avgs": [[values.clone()]], "exp_avg_sqs": [[values.abs()]]},
        [],
        [torch.ones(1)],
    ).to(device)
    call(ops, rule, state, [torch.zeros(1, len(values), device=device)], keys=[1])
    assert torch.equal(state.moments["exp_avgs"][0][0].cpu(), values / 2)
    assert torch.equal(state.moments["exp_avg_sqs"][0][0].cpu(), values.abs() / 2)
    zeros = begin(RULES["momentum"], [(500,)], 2, [HALF])
    for tensor in [*zeros.buffers, *_moments(zeros)]:
        tensor.zero_()
    after = step("momentum", zeros, [torch.zeros(2, 500)], device, keys=[1])
    assert all((t == 0).all() for t in (*after.buffers, *_moments(after)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rounding_keeps_nan_and_infinity(bad: float, device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(400,)], 2, [HALF])
        jacobians = gradients(state, 2)
        jacobians[0][1, ::3] = bad
        got, eager = step(rule, state, jacobians, device, keys=[11]), state.clone()
        call(reference, RULES[rule], eager, jacobians, keys=[11])
        for name, tensor in got.named().items():
            other = eager.named()[name]
            assert torch.equal(tensor.isnan(), other.isnan()), name
            assert torch.equal(tensor.isinf(), other.isinf()), name
            if name.endswith("[0][1]"):
                assert not tensor[::3].isfinite().any()
                assert tensor[1::3].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC0FFFF, 0x7F800001, -0x7F0001])
def test_rounding_keeps_every_nan(bits: int, device: str) -> None:
    """Also those whose lower bits would carry, of all ones to minus zero."""
    jacobian = torch.full((1, 400), bits, dtype=torch.int32).view(torch.float32).to(device)
    assert jacobian.isnan().all()
    for rule in KINDS:
        state = begin(RULES[rule], [(400,)], 1, [HALF]).to(device)
        call(ops, RULES[rule], state, [jacobian], keys=[11])
        assert all(m.isnan().all() for m in (*_moments(state), *state.buffers, *state.parameters)), rule


def test_all_numbers_round_as_their_bits_say() -> None:
    """The helper by itself, for all upper halves and some lower ones: up exactly if the lower half and the random bits
    carry."""
    upper = torch.arange(2**16).repeat_interleave(4)
    lower = torch.tensor([0, 1, 0x8000, 0xFFFF]).repeat(2**16)
    whole = upper * 2**16 + lower
    value = torch.where(whole >= 2**31, whole - 2**32, whole).int().view(torch.float32)
    for bits in (0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF):
        got = round_stochastically(value, torch.full_like(whole, bits))
        want = upper + (lower + bits >= 2**16)
        number = ~value.isnan()
        assert torch.equal(got.isnan(), ~number | _nan(want))
        assert torch.equal(got.view(torch.int16).long()[number] & 0xFFFF, want[number])


def _nan(upper: Tensor) -> Tensor:
    return (upper & 0x7FFF) > 0x7F80


def test_random_bits_of_keys_tasks_steps_and_elements_are_independent(device: str) -> None:
    size, tasks = 4096, 3
    # Moments between two bfloat16 numbers after the step: 1.0039 times 0.8, and times 0.95.
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.8, 0.95), "lr": 0.0})

    def choices(key: int, count: float) -> Tensor:
        moments = {n: [[torch.ones(size).bfloat16() for _ in range(tasks)]] for n in rule.moments}
        state = State([torch.zeros(size)], moments, [], [torch.full((tasks,), count)]).to(device)
        call(ops, rule, state, [torch.zeros(tasks, size, device=device)], keys=[key])
        rounded = torch.stack([torch.stack(state.moments[n][0]) for n in rule.moments]).cpu().double()
        exactly = torch.tensor([0.8, 0.95], dtype=torch.float64)[:, None, None]
        return (rounded - exactly) / (rounded - exactly).square().mean().sqrt()

    streams: dict[str, Tensor] = {}
    for key in (0, 1, 2, 2**32, 2**33, -1):
        for count in (0.0, 1.0, 5.0):
            found = choices(key, count)
            streams |= {f"{key} {count} {m} {t}": found[m, t] for m in range(2) for t in range(tasks)}
    z = torch.stack(list(streams.values()))
    limit = 5.5 / math.sqrt(size)  # of thousands of pairs
    assert z.mean(1).abs().max() <= limit
    products = z @ z.mT / size
    assert (products - products.diagonal().diag()).abs().max() <= limit
    for lag in (1, 2, 3, 4, 8, 16, 32, 256, 1024):
        assert (z[:, lag:] * z[:, :-lag]).mean(1).abs().max() <= limit * 1.2


def test_an_average_of_bfloat16_converges_only_with_stochastic_rounding(device: str) -> None:
    """Of beta2 = 0.999 each step moves it by less than half a gap, long before it is there."""
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.9, 0.999), "lr": 0.0})
    size, steps = 512, 3000 if device == "cpu" else 1000

    def end(keys: list[int] | None) -> Tensor:
        moments = {n: [[torch.zeros(size).bfloat16()]] for n in rule.moments}
        state = State([torch.zeros(size)], moments, [], [torch.zeros(1)]).to(device)
        ones = torch.ones(1, size, device=device)
        for _ in range(steps):
            call(ops, rule, state, [ones], keys=keys)
        return state.moments["exp_avg_sqs"][0][0].cpu().double()

    want = 1 - 0.999**steps
    rounded = end([9])
    assert abs(float(rounded.mean()) - want) <= 0.01 * want
    assert float(end(None).mean()) < 0.6 * want


def test_keys_matter_only_to_bfloat16_moments(device: str) -> None:
    for rule in KINDS:
        for types in (SINGLE, TYPES[2], TYPES[4]):
            state = begin(RULES[rule], [(100,)], 2, [types])
            jacobians = gradients(state, 2)
            assert_same(step(rule, state, jacobians, device, keys=[3]), step(rule, state, jacobians, device))
        state = begin(RULES[rule], [(100,)], 2, [HALF])
        with_keys, without = (step(rule, state, gradients(state, 2), device, keys=k) for k in ([3], None))
        # The parameter's step comes before the rounding, also that of a buffer.
        assert torch.allclose(with_keys.parameters[0], without.parameters[0], rtol=1e-6, atol=1e-6)
        assert torch.allclose(with_keys.squares[0], without.squares[0], rtol=1e-6)
