"""A round of alphaVIL done over again, literally, with nothing of mtlgrad: a copy of the model a task, Python loops
over names and tasks, parameters taken out of the model and tensors put in."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Round
from tests.support.alphavil_cases import ALPHA, SGD, Batch, Case, values
from tests.support.optim_cases import near


def transplanted(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode with these tensors for its parameters: gradients flow to where they come from."""
    other = copy.deepcopy(model).eval()
    first = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first[id(p)] in parameters:
            path, _, last = name.rpartition(".")
            module = other.get_submodule(path)
            del module._parameters[last]
            setattr(module, last, parameters[first[id(p)]])
    with torch.no_grad():
        for name, b in other.named_buffers():
            b.copy_(buffers[name])
    return other


class Literal:
    """theta, buffers and task weights, moved round after round. `alphas`, `kept` ... are those of the last."""

    def __init__(
        self,
        case: Case,
        *,
        make_optimizer: Any = SGD,
        alpha_optimizer: Any = ALPHA["sgd"],
        alpha_epochs: int = 2,
        clip_alpha: tuple[float, float] | None = None,
        include_heads: str = "own",
        min_weight: float = 0.01,
    ):
        self.case, self.model = case, copy.deepcopy(case.model)
        self.make_optimizer, self.alpha_optimizer = make_optimizer, alpha_optimizer
        self.alpha_epochs, self.clip, self.include_heads = alpha_epochs, clip_alpha, include_heads
        self.names, self.min_weight = list(case.tasks), min_weight
        self.weights = dict.fromkeys(self.names, 1.0)

    def owners(self, parameter: str) -> list[str]:
        found = [name for name in self.names if parameter in self.case.heads[name]]
        return [] if self.include_heads == "all" else found

    def may(self, task: str, parameter: str) -> bool:
        owners = self.owners(parameter)
        return not owners or task in owners

    def train(self, task: str, part: Iterable[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """What it makes of the parameters that it may move, and of the buffers; its mean loss."""
        model = copy.deepcopy(self.model)
        mine = {n: p for n, p in model.named_parameters() if p.requires_grad and self.may(task, n)}
        optimizer = self.make_optimizer(list(mine.values()))
        losses, weight = [], self.weights[task]
        weight = self.min_weight if weight < 0 and self.min_weight > weight else weight
        for batch in part:
            for p in model.parameters():
                p.grad = None
            loss = self.case.tasks[task].loss(model, batch)
            (weight * loss).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        changed = {n: b for n, b in model.named_buffers() if not torch.equal(b, self.model.get_buffer(n))}
        return {n: p.detach() for n, p in mine.items()}, changed, sum(losses) / len(losses)

    def round(self, parts: Mapping[str, Iterable[Batch]]) -> None:
        theta = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        deltas: dict[str, dict[str, Tensor]] = {}
        buffers: dict[str, list[Tensor]] = {n: [] for n, _ in self.model.named_buffers()}
        self.losses = []
        for task in self.names:
            after, changed, loss = self.train(task, parts[task])
            self.losses.append(loss)
            self.case.diary.clear()
            if all(bool(value.isfinite().all()) for value in (*after.values(), *changed.values())):
                deltas[task] = {n: after[n] - theta[n] for n in after}
                for n, value in changed.items():
                    buffers[n].append(value)
        self.sat_out = [name for name in self.names if name not in deltas]
        own = {n: b.clone() for n, b in self.model.named_buffers()}
        merged = dict(own)
        for n, found in buffers.items():
            if found:
                stacked = torch.stack(found)
                merged[n] = stacked.mean(0) if stacked.is_floating_point() else stacked.max(0).values

        def displaced(alphas: Tensor) -> dict[str, Tensor]:
            moved = {}
            for n, start in theta.items():
                total = start.double()
                for i, task in enumerate(self.names):
                    if n in deltas.get(task, {}):
                        weight = 1.0 if self.include_heads == "none" and self.owners(n) else alphas[i]
                        total = total + weight * deltas[task][n].double()
                moved[n] = total.to(start.dtype)
            return moved

        task = self.case.tasks[self.case.target]
        dev: list[Batch] = list(task.dev)  # type: ignore[arg-type]

        def loss_at(parameters: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> float:
            with torch.no_grad():
                model = transplanted(self.model, parameters, statistics)
                return sum(float(task.loss(model, batch)) for batch in dev) / len(dev)

        alphas = torch.ones(len(self.names), dtype=torch.float64, requires_grad=True)
        optimizer = self.alpha_optimizer([alphas])
        self.before, self.start = loss_at(theta, own), loss_at(displaced(alphas), merged)
        best, self.after, self.kept = torch.ones(len(self.names), dtype=torch.float64), self.start, "start"
        self.searched: list[float] = []
        while math.isfinite(self.start) and len(self.searched) < self.alpha_epochs:
            for batch in dev:

                def closure(batch: Batch = batch) -> Tensor:
                    loss = task.loss(transplanted(self.model, displaced(alphas), merged), batch)
                    (alphas.grad,) = torch.autograd.grad(loss, alphas)
                    return loss.detach()

                optimizer.step(closure)
                if self.clip is not None:
                    alphas.data.clamp_(*self.clip)
            self.searched.append(loss_at(displaced(alphas), merged))
            if not math.isfinite(self.searched[-1]):
                break
            if self.searched[-1] < self.after:
                best, self.after, self.kept = alphas.detach().clone(), self.searched[-1], "search"
        self.alphas = best
        if self.after <= self.before:
            self.model.load_state_dict({**displaced(best), **merged}, strict=False)
            for i, name in enumerate(self.names):
                if name in deltas and float(best[i]) != 1.0:
                    self.weights[name] = self.weights[name] + float(best[i]) - 1.0
        else:
            self.alphas, self.after, self.kept = torch.zeros_like(best), self.before, "none"

    def compare(self, vil: AlphaVIL, found: Round, tolerance: float) -> None:
        assert (found.kept, found.sat_out) == (self.kept, [self.names.index(name) for name in self.sat_out])
        mine = values(self.model)
        for name, got in values(vil.model).items():
            assert near(got, mine[name], tolerance), name
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        assert near(vil.task_weights, weights, tolerance)
        assert near(vil.alphas, self.alphas, tolerance)
        assert vil.alphas.dtype == vil.task_weights.dtype == torch.float64
        for ours, its in (
            ([found.before, found.start, found.after], [self.before, self.start, self.after]),
            (found.searched, self.searched),
            (found.losses, self.losses),
        ):
            a, b = (torch.tensor(some, dtype=torch.float64) for some in (ours, its))
            assert torch.equal(a.isnan(), b.isnan())
            assert near(a.nan_to_num(), b.nan_to_num(), tolerance)
