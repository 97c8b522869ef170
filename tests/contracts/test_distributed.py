"""global_means, average_jacobians, and the groups that collectives run on."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

import mtlgrad
from mtlgrad.distributed import average_jacobians, global_means
from mtlgrad.world.alike import digest
from mtlgrad.world.ranks import ALONE, Averaging, name_of, world_of
from tests.support.ranks import Pool


def means(counts: list[list[int]]) -> list[float]:
    own = counts[dist.get_rank()]
    values = [(torch.arange(n, dtype=torch.float64) + 10 * dist.get_rank()).requires_grad_() for n in own]
    losses = global_means(values)
    torch.stack(losses).sum().backward()
    for value, column in zip(values, zip(*counts)):
        torch.testing.assert_close(
            value.grad, torch.full_like(value, dist.get_world_size() / max(sum(column), 1)), rtol=1e-15, atol=0
        )
    return [float(loss.detach()) for loss in losses]


@pytest.mark.parametrize("counts", [[[4, 2, 0], [4, 3, 0]], [[5, 0, 1], [1, 2, 1]]])
def test_global_means(two_ranks: Pool, counts: list[list[int]]) -> None:
    found = two_ranks(means, counts)
    for t in range(3):
        values = [i + 10.0 * r for r in range(2) for i in range(counts[r][t])]
        expected = sum(values) / len(values) if values else 0.0
        assert sum(loss[t] for loss in found) / 2 == pytest.approx(expected, rel=1e-14)


def test_global_means_of_one_process() -> None:
    found = global_means({"a": torch.tensor([1.0, 3.0]), "b": torch.empty(0)})
    assert {name: float(value) for name, value in found.items()} == {"a": 2.0, "b": 0.0}
    with pytest.raises(TypeError, match="values: expected tensors, found NoneType for task 1"):
        global_means([torch.ones(2), None])  # type: ignore[list-item]


def rows() -> None:
    world = world_of(None)
    assert world.size == dist.get_world_size()
    assert world.rank == dist.get_rank()
    count = 3 * world.rank
    counts = [row[0] for row in world.gather_numbers([count], torch.device("cpu"))]
    assert counts == [3 * r for r in range(world.size)]
    every = world.gather_rows(torch.full((count, 2), float(world.rank)), counts)
    assert every[:, 0].tolist() == [float(r) for r in range(world.size) for _ in range(3 * r)]
    # more than a bucket, several dtypes, not contiguous, empty, scalar
    tensors = [torch.full(s, float(world.rank)) for s in ((9_000_000,), (7, 3), (0,), (), (5,))]
    tensors += [torch.full((4, 6), float(world.rank)).t(), torch.full((3,), float(world.rank), dtype=torch.float64)]
    averaging = Averaging(world)
    averaging.add(tensors)
    averaging.wait()
    for tensor in tensors:
        assert torch.equal(tensor, torch.full_like(tensor, (world.size - 1) / 2))


def test_collectives(two_ranks: Pool, four_ranks: Pool) -> None:
    two_ranks(rows)
    four_ranks(rows)


def groups() -> None:
    first, second = world_of(None), world_of(None)
    assert first == second
    assert first != ALONE
    assert first.name != dist.group.WORLD.group_name
    alone, _ = dist.new_subgroups(group_size=1)
    assert world_of(name_of("test", alone)) == ALONE
    pair, _ = dist.new_subgroups(group_size=2)
    found = world_of(name_of("test", pair))
    assert (found.size, found.rank) == (2, dist.get_rank() % 2)
    backend = torch.device("cpu")
    timeout = dist.group.WORLD._get_backend(backend).options._timeout
    assert first.group._get_backend(backend).options._timeout == timeout
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed process group, found str"):
        mtlgrad.AlignedMTL(2, process_group="world")  # type: ignore[arg-type]


def test_groups(four_ranks: Pool) -> None:
    four_ranks(groups)


def jacobians() -> float:
    p = torch.nn.Parameter(torch.zeros(3))
    p.jac = torch.full((2, 3), float(dist.get_rank()))  # type: ignore[attr-defined]
    aligned = mtlgrad.AlignedMTL(2)
    optimizer = mtlgrad.optim.AdaTaskAdam([p], num_tasks=2)
    for use in (lambda: aligned.merge([p]), optimizer.step):
        with pytest.raises(RuntimeError, match=r"expected \.jac that is the mean over the 2 ranks, found this rank's"):
            use()
    average_jacobians([p, torch.nn.Parameter(torch.zeros(1))])
    average_jacobians([p])  # once is enough
    optimizer.step()
    aligned.merge([p], retain_jac=True)
    return float(p.jac[1, 2])


def test_jacobians_of_one_rank_are_refused(two_ranks: Pool) -> None:
    assert two_ranks(jacobians) == [0.5, 0.5]


def written_into() -> None:
    """What others add to a mean is this rank's own again; what keeps it a mean is not."""
    rank = float(dist.get_rank())
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = mtlgrad.optim.AdaTaskAdam([p], num_tasks=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    refused = pytest.raises(RuntimeError, match=r"\.jac that is the mean over the 2 ranks")
    p.jac = torch.full((2, 3), rank)  # type: ignore[attr-defined]
    with refused:
        mtlgrad.optim.clip_task_grad_norm_([p], 1.0)
    scaler.scale(torch.zeros(()))
    with refused:
        scaler.step(optimizer)
    scaler.unscale_(optimizer)
    with refused:
        mtlgrad.optim.unscale_jac_(scaler, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    average_jacobians([p])
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    mtlgrad.optim.unscale_jac_(scaler, optimizer)
    mtlgrad.optim.clip_task_grad_norm_([p], 0.1)
    optimizer.step()
    p.jac += rank  # as TorchJD accumulates
    with refused:
        optimizer.step()
    average_jacobians([p])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def test_a_mean_that_was_written_into(two_ranks: Pool) -> None:
    two_ranks(written_into)


def other_parameters() -> None:
    p = torch.nn.ParameterList([torch.zeros(3), torch.zeros(3)])
    p[dist.get_rank()].jac = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"average_jacobians: expected the same parameters with \.jac on all ranks"):
        average_jacobians(p)


def test_other_parameters_are_refused(two_ranks: Pool) -> None:
    two_ranks(other_parameters)


def half_of_them() -> None:
    pair, _ = dist.new_subgroups(group_size=2)
    p = torch.nn.Parameter(torch.zeros(3))
    p.jac = torch.full((2, 3), float(dist.get_rank()))  # type: ignore[attr-defined]
    average_jacobians([p], process_group=pair)
    with pytest.raises(RuntimeError, match=r"the mean over the 4 ranks"):
        mtlgrad.optim.AdaTaskAdam([p], num_tasks=2).step()
    mtlgrad.optim.AdaTaskAdam([p], num_tasks=2, process_group=pair).step()
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        return  # an older torch sorts them always
    turned = dist.new_group([3, 1, 0, 2], sort_ranks=False)
    world = world_of(name_of("test", turned))
    every = world.gather_rows(torch.full((1,), float(world.rank)), [1] * 4)
    assert every.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_part_of_the_ranks(four_ranks: Pool) -> None:
    four_ranks(half_of_them)


def test_digests_are_of_the_whole_text() -> None:
    """Ranks whose models differ in their last layer alone must not seem alike."""
    assert digest("a" * 10_000 + "b") != digest("a" * 10_000 + "c")
