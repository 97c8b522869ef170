"""alphaVIL: between epochs, weighs the parameter updates that each task makes by how much they help one of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..world.alike import check_same
from ..world.ranks import ALONE, World, name_of, world_of
from . import random_state
from .buffers import Buffers, finite
from .checks import (
    check_clip,
    check_counts,
    check_dense,
    check_epochs,
    check_maker,
    check_min_weight,
    check_model,
    check_models,
    check_state,
    checked_weights,
)
from .deltas import Copies, Deltas, Heads, Storage, groups_of
from .records import Kind, Round, Stage
from .search import MakeOptimizer, Search, made, training_mode
from .tasks import Task, check_gradient, check_subset, checked_loss, named, sample, target_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALPHA_OPTIMIZER: MakeOptimizer = partial(torch.optim.SGD, lr=0.1)


class AlphaVIL:
    """Train a model for the good of one task, the target, by weighing what the training of each task does to it.

    A round, :meth:`epoch`: from the same parameters theta each task t trains on w_t L_t over a sampled part of its
    batches, which leads to theta + delta_t. Then alpha, 1 for all at first, descends the target's development loss at
    theta + sum_t alpha_t delta_t. Then theta <- theta + sum_t alpha_t delta_t and w_t <- w_t + (alpha_t - 1).

    Args:
        model: any module.
        tasks: names and :class:`mtlgrad.alphavil.Task`; or a list, whose tasks are called "0", "1", ...
        target: the name or number of the task to help; it needs ``dev``.
        make_optimizer: parameters -> the ``torch.optim.Optimizer`` for one task's training. Called for each task and
            round, so that no state outlives a training; read :attr:`rounds` in it for a schedule. Adam's steps do not
            depend on the size of w_t, those of SGD do.
        alpha_optimizer: [alpha] -> the optimizer for alpha, a tensor [T] float64; called for each round. LBFGS, given
            all development data as one batch, makes the search a line search in T directions.
        alpha_epochs: passes over the development data, a step of alpha for each batch.
        subset: the part of a task's batches that it trains on in a round: a fraction (1.0: all), or a number. Of a list
            it is drawn anew in each round; of another iterable it is the beginning, so let a loader shuffle.
        clip_alpha: (low, high) for alpha after each step.
        min_weight: a task whose weight has become negative trains on min_weight L_t instead: else it would train to
            raise its loss, which has no bound. -inf is the paper's rule as it is.
        include_heads: "own": alpha_t also weighs what task t made of its own head. "none": it weighs the shared
            parameters alone, heads move by their whole delta. "all": heads are not told from shared parameters; every
            task's optimizer is given all of them.
        delta_storage: where the deltas are: "parameters", as and where the parameters are; "bfloat16", in half of
            float32's memory, rounded once; "host", in pinned memory of the host, brought to the device 64 MiB at a
            time (or a parameter's T deltas, where they are larger); "host-bfloat16", both.
        buffers: what becomes of buffers that are no BatchNorm's or InstanceNorm's, and of parameters without gradient:
            "target", as the target's training left them, or "mean", the mean over the tasks; one for all, or by name.
        process_group: the ranks that train together, each with its part of the data; all, if not given (and
            torch.distributed is initialised). In a group of one rank it trains alone. See below.

    Attributes: ``task_weights`` [T] float64, which may be set; ``alphas`` [T] of the last round; ``last``, its
    :class:`mtlgrad.alphavil.Round`; ``rounds``, how many are done; ``names``.

    What is the paper's (arXiv 2405.07769, its public text, as in DESIGN 4.5): that tasks are trained apart from the
    same parameters on w_t L_t over sampled data, the alphas that start at 1 and descend the target's development loss,
    the two updates at the end. No code was published, and the paper's optimizers, learning rates and numbers of steps
    could not be verified: all defaults are ours. So are these rules:

    - The best alpha seen is kept, judged by the whole development loss after each pass. alpha = 1 is among them, and so
      are the parameters before the round: where all alphas are worse (``Round.kept == "none"``), parameters, buffers
      and weights stay. So no round raises the development loss; T = 1 is a line search. A warning says so, and also
      where the search finds none better than alpha = 1.
    - Development losses are taken in evaluation mode, trainings in training mode: a model that is in it keeps what is
      frozen (a BatchNorm in evaluation mode), another is put in it as a whole. Every module's mode is put back.
    - BatchNorm's and InstanceNorm's statistics become the mean over the tasks whose training changed them, counters of
      batches the largest. All other buffers (queues and their pointers; spectral norm's vectors, which the next
      training brings up to date), and parameters without gradient that a forward moves (a teacher), are as the target's
      training left them, or the last task's that changed them: ``buffers=`` says otherwise. The search already uses
      these. All trainings start from the same ones. A buffer that the model makes or resizes in its forward is taken
      for a cache and left alone.
    - A task whose training comes to NaN or infinity sits the round out, with a warning, and keeps its weight.

    Memory beside the model, its activations and T small tensors, with S bytes of shared parameters, H_t of head t, H of
    all heads (bfloat16 storage halves the deltas; host storage moves them to the host):

    ============================  ======================================================================================
    deltas, from round to round   T S + H; ``include_heads="all"``: T (S + H)
    while task t trains           + S + H (a copy of theta; and of what is not trained), its gradients S + H_t, its
                                  optimizer's state
    during the search             + S + H (the displaced parameters), their gradients for the target's loss S + H_target
                                  (the shared ones' alone with ``include_heads="none"``)
    when the parameters move      + S + H
    ============================  ======================================================================================

    On several ranks (torch.distributed) each has the same plain model (no DistributedDataParallel around it, no
    fully_shard) and its own batches. A step of a task's training takes the mean of the ranks' gradients, one of alpha
    the mean of d loss / d alpha; losses in :class:`Round` and :class:`Stage` are means, too, and all ranks decide
    alike. So they do what one process would on the ranks' batches put together, if these are of one size on all ranks
    or losses go through :func:`mtlgrad.distributed.global_means`.

    - Each rank must give as many batches to a task's training and to a pass over the development data: compared before
      where there is a ``len()``. Streams have none; one that ends early leaves the other ranks waiting until the
      process group's timeout, as any error does that one rank alone meets (NaN is none).
    - Buffers: what a task's training changed on any rank becomes the mean over the ranks (the largest where they hold
      no floats); of those that are not averaged, the first rank's. With ``torch.nn.SyncBatchNorm`` that is one
      process's statistics; BatchNorm takes each rank's own.
    - Random numbers are each rank's own: seed the ranks alike for the same order of batches, else for other dropout.
    - Parameters and buffers are compared by their norms before the first round and after :meth:`load_state_dict`. Each
      rank saves a state of its own, since random state is in it.
    - Memory: while a task trains, its gradients S + H_t once more, as they travel.

    Raises:
        RuntimeError: ranks that are not in step.
        TypeError: a model, task, loss or function of another kind.
        ValueError: an option out of its range, data without batches, a development loss that is not finite before the
            round, or ranks with other parameters.

    A stage that raises (Ctrl-C, too) leaves model, weights and random state as they were before it.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, Task] | Sequence[Task],
        target: str | int,
        *,
        make_optimizer: MakeOptimizer,
        alpha_optimizer: MakeOptimizer = ALPHA_OPTIMIZER,
        alpha_epochs: int = 5,
        subset: float | int = 1.0,
        clip_alpha: tuple[float, float] | None = None,
        include_heads: Heads = "own",
        min_weight: float = 0.01,
        delta_storage: Storage = "parameters",
        buffers: str | Mapping[str, str] = "target",
        process_group: ProcessGroup | None = None,
    ):
        check_model(model)
        self.model, self._tasks = model, named(tasks)
        self.names = list(self._tasks)
        self.target = target_of(self._tasks, target)
        check_subset(self._tasks, subset)
        check_clip(clip_alpha)
        check_min_weight(min_weight)
        check_epochs(alpha_epochs)
        check_maker("make_optimizer", make_optimizer)
        check_maker("alpha_optimizer", alpha_optimizer)
        self._group = name_of("AlphaVIL", process_group)
        self._world = ALONE
        self.make_optimizer, self.alpha_epochs, self.subset = make_optimizer, alpha_epochs, subset
        self.min_weight, self.include_heads, self.delta_storage = float(min_weight), include_heads, delta_storage
        self._find_parameters()
        self._buffers = Buffers(model, buffers)
        name = self.names[self.target]
        self._search = Search(model, self._tasks[name], name, self._buffers, alpha_optimizer, clip_alpha)
        sources = [source for task in self._tasks.values() for source in (task.train, task.dev)]
        self._generators = random_state.generators_of(sources)
        self._task_weights = torch.ones(len(self.names), dtype=torch.float64, device="cpu")
        self.rounds = 0
        self.last: Round | None = None
        self._round: Round | None = None
        self._stage = 0

    def _find_parameters(self) -> None:
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups = groups_of(self.model, self._tasks, self.target, self.include_heads)
        self._deltas = Deltas(groups, self.delta_storage)
        self._alike: World | None = None  # whose ranks are known to have the same model

    @property
    def task_weights(self) -> Tensor:
        """Return w, [T] float64. May be set, to T finite numbers in anything that torch.as_tensor takes."""
        return self._task_weights

    @task_weights.setter
    def task_weights(self, weights: Any) -> None:
        self._task_weights = checked_weights(weights, len(self.names))

    @property
    def alphas(self) -> Tensor:
        """Return the last finished round's alphas, [T] float64; ones before the first."""
        return torch.ones_like(self.task_weights) if self.last is None else self.last.alphas

    def epoch(self) -> Round:
        """Run a round, or what is left of the one that was begun.

        Returns:
            What came of it.

        Raises:
            RuntimeError, TypeError, ValueError: as the class says.
        """
        for _, said in self._run():
            for text in said:
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        assert self.last is not None
        return self.last

    def stages(self) -> Iterator[Stage]:
        """Run a round, or what is left of it, stage by stage.

        Between two stages the model is as before the round, and :meth:`state_dict` has all that is needed to go on. A
        stage that raises leaves everything as it was before the stage, random state too.

        Yields:
            Every stage, when it is done.

        Raises:
            RuntimeError, TypeError, ValueError: as the class says.
        """
        for stage, said in self._run():
            for text in said:
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            yield stage

    def _run(self) -> Iterator[tuple[Stage, list[str]]]:
        """Stages and what is to be said about them: after they are done, since a filter may turn it into errors."""
        if self._round is None:
            # Layers may have been frozen or set free since the last round.
            if list(map(id, self._trainable)) != [id(p) for p in self.model.parameters() if p.requires_grad]:
                check_model(self.model)
                self._find_parameters()
            self._round, self._stage = Round(torch.ones_like(self.task_weights)), 0
            self._buffers.clear()
        while self._round is not None:
            yield self._advance(self._round)

    def _advance(self, now: Round) -> tuple[Stage, list[str]]:
        device, said = self._deltas.device, list[str]()
        before = random_state.capture(self._generators, device)
        count, name = len(self.names), self.names[self.target]
        kind: Kind
        try:
            self._check_ranks()
            if self._stage < count:
                kind, name, loss = "train", self.names[self._stage], self._train(now, self._stage, said)
            elif self._stage == count:
                kind, loss = "evaluate", self._evaluate(now)
            elif self._searching(now):
                kind, loss = "alpha", self._alpha_epoch(now)
            else:
                kind, loss = "move", self._move(now, said)
        except BaseException:
            random_state.restore(before, self._generators, device)
            raise
        self._stage += 1
        return Stage(kind, name, self._stage, count + 2 + self.alpha_epochs, loss), said

    def _check_ranks(self) -> None:
        self._world = world_of(self._group)
        known = "known to be alike" if self._alike == self._world else "to be compared"
        found = (
            f"stage {self._stage + 1} of round {self.rounds + 1}, tasks {self.names}, target {self.target}, "
            f"{self.alpha_epochs} alpha_epochs, weights {self.task_weights.tolist()}, "
            f"{len(self._trainable)} parameters to train, {known}"
        )
        hint = "resume all ranks from checkpoints of the same stage, and give them the same arguments and task_weights"
        # Else they would wait for each other, or take each other's numbers for their own. Bytes: 8 a rank.
        check_same("AlphaVIL", "stage", found, hint, self._world, self._deltas.device)
        if self._alike != self._world:
            check_models(self.model, self._deltas.groups, self._world)
            self._alike = self._world

    def _train(self, now: Round, t: int, said: list[str]) -> float:
        """delta_t: from the round's parameters, w_t L_t over a part of the task's batches."""
        theta, buffers = self._deltas.copy_parameters(), self._buffers.copy()
        try:
            with training_mode(self.model):
                loss = self._descend(t)
            changed = self._buffers.changed(buffers, self._world)
            sound = self._deltas.take(t, theta) and finite(changed, buffers)
            where = self._world.control_device(self._deltas.device)
            both = torch.tensor([loss, float(sound)], dtype=torch.float64, device=where)
            loss, share = self._world.mean_(both).tolist()
            sound = share == 1.0
            if sound:
                self._buffers.take(changed, t == self.target)
        finally:
            self._put_back(theta, buffers)
            self.model.zero_grad(set_to_none=True)
        if not sound:
            now.sat_out.append(t)
            said.append(
                f"AlphaVIL: task {self.names[t]!r}: expected finite parameters and buffers after training, found NaN "
                "or infinity; it sits this round out and keeps its weight; lower its learning rate, or look at its data"
            )
        now.losses.append(loss)
        return loss

    def _put_back(self, theta: Copies, buffers: dict[str, Tensor]) -> None:
        """Put the model back as it was; from the start if Ctrl-C comes in between."""
        try:
            self._deltas.put_back(theta)
            self._buffers.put_back(buffers)
        except BaseException:
            self._deltas.put_back(theta)
            self._buffers.put_back(buffers)
            raise

    def _descend(self, t: int) -> float:
        name, weight = self.names[t], float(self.task_weights[t])
        weight = weight if weight >= 0.0 else max(weight, self.min_weight)
        task, trained = self._tasks[name], self._deltas.trained_by(t)
        optimizer = made("make_optimizer", self.make_optimizer, trained)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("AlphaVIL: make_optimizer: expected one whose step needs no closure, found LBFGS; take SGD")
        check_counts(name, "train", task.train, self.subset, self._world, self._deltas.device)
        losses: list[Tensor] = []
        for batch in sample(name, task.train, self.subset):
            self.model.zero_grad(set_to_none=True)
            loss = checked_loss(name, task.loss(self.model, batch))
            check_gradient(name, loss)
            (weight * loss).backward()
            check_dense(name, trained, self._world)
            self._world.average_gradients(trained)
            optimizer.step()
            losses.append(loss.detach().double())
        return float(torch.stack(losses).mean())

    def _evaluate(self, now: Round) -> float:
        """Find the development loss before the round, and at alpha = 1, where the search starts."""
        self._search.begin(len(self.names), now.sat_out, self._deltas.device)
        before = self._search.loss(None, self._world)
        if not math.isfinite(before):
            raise ValueError(
                f"AlphaVIL: tasks: {self.names[self.target]!r}, the target: dev: expected a finite loss at the model's "
                f"parameters, found {before}; go back to a checkpoint, or look at the development data"
            )
        start = self._search.loss(self._deltas, self._world)
        now.before, now.start, now.after, now.kept = before, start, start, "start"
        return start

    def _searching(self, now: Round) -> bool:
        last = now.searched[-1] if now.searched else now.start
        left = len(now.searched) < self.alpha_epochs
        return left and math.isfinite(last) and self._deltas.weigh(self.target, now.sat_out)

    def _alpha_epoch(self, now: Round) -> float:
        state = self._search.state_dict()
        try:
            sound = self._search.epoch(self._deltas, self._world)
            loss = self._search.loss(self._deltas, self._world) if sound else math.nan
        except BaseException:
            self._search.load_state_dict(state, self._deltas.device)
            raise
        now.searched.append(loss)
        if loss < now.after:
            now.alphas, now.after, now.kept = self._search.alphas.detach().cpu().clone(), loss, "search"
        return loss

    def _move(self, now: Round, said: list[str]) -> float:
        target = f"AlphaVIL: target {self.names[self.target]!r}"
        nothing = len(now.sat_out) == len(self.names)
        if now.after <= now.before and not nothing:
            theta, buffers = self._deltas.copy_parameters(), self._buffers.copy()
            try:
                self._deltas.move(now.alphas.to(self._deltas.device), now.sat_out)
                self._buffers.move()
            except BaseException:
                self._put_back(theta, buffers)
                raise
            self._task_weights = self._task_weights + (now.alphas - 1.0)
            if now.kept == "start" and now.searched:
                said.append(
                    f"{target}: expected the search to lower its development loss, found none lower than at alpha = 1, "
                    "which is kept; lower the learning rate of alpha_optimizer, or take more alpha_epochs"
                )
        else:
            now.alphas, now.after, now.kept = torch.zeros_like(now.alphas), now.before, "none"
            why = "every task sat out" if nothing else "expected an alpha that lowers its development loss, found none"
            said.append(f"{target}: {why}; parameters and task weights stay as they were before this round")
        self.last, self._round = now, None
        self.rounds += 1
        return now.after

    def state_dict(self) -> dict[str, Any]:
        """Save all but the model, whose own ``state_dict()`` belongs beside it.

        In the middle of a round it holds the deltas there are, by reference: save it before going on. The random state
        in it is that of torch, numpy, Python and of the generators that loaders were given; workers that outlive a pass
        (``persistent_workers``) and generators inside losses and data sets are beyond its reach.

        Returns:
            What ``torch.load(weights_only=True)`` reads.
        """
        middle = self._round is not None
        return {
            "tasks": list(self.names),
            "target": self.target,
            "rounds": self.rounds,
            "task_weights": self.task_weights.clone(),
            "last": None if self.last is None else self.last.state_dict(),
            "round": None if self._round is None else self._round.state_dict(),
            "stage": self._stage,
            "deltas": self._deltas.state_dict() if middle else [],
            "buffers": self._buffers.state_dict() if middle else {"merged": {}, "count": {}},
            "search": self._search.state_dict(),
            "random": random_state.capture(self._generators, self._deltas.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model is to be loaded, too. Sets the global random state.

        Args:
            state: what that gave.

        Raises:
            ValueError: a state of other tasks, another target, model or loaders.
        """
        check_state(state, self.names, self.target, self._buffers.named(), len(self._generators))
        self._deltas.load_state_dict(state["deltas"])
        self._buffers.load_state_dict(state["buffers"])
        self._search.load_state_dict(state["search"], self._deltas.device)
        self.rounds, self._stage, self._alike = state["rounds"], state["stage"], None
        self.task_weights = state["task_weights"]
        self.last, self._round = (
            None if state[key] is None else Round.from_state(state[key]) for key in ("last", "round")
        )
        random_state.restore(state["random"], self._generators, self._deltas.device)
