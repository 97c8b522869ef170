"""What AdaTask's four optimizers have in common: which parameters take which rule, their state, and dominance."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ..arguments import parameter_list
from ..jacobian import Rows, as_gradients, order_of, reorder, rows_of
from ..ops import Operation, Step, TaskStep, step_settings
from ..world.jacobians import check_averaged, still_averaged
from ..world.ranks import name_of
from ..world.shards import Totals, is_sharded, key_of_shard, local, only_row
from . import amp
from .checks import all_fit, check_gradients, check_jacobian, present_tasks
from .clip import clip_rows
from .dominance import Layers, layer_shares
from .options import TaskOptions, check_group, moments_name
from .plan import StepPlan, TaskParameters, gradients_of, standing_still

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TaskOptimizer(torch.optim.Optimizer):
    """The first base of an optimizer whose other base is one of torch.optim.

    A parameter with ``.jac`` takes the rule per task; any other the ordinary one, by torch.optim's own code.
    """

    #: The optimizer of torch.optim for ordinary parameters.
    ordinary: ClassVar[type[torch.optim.Optimizer]]
    takes_sparse: ClassVar[bool] = False  #: whether that reads sparse gradients
    operation: ClassVar[Operation]
    moments: ClassVar[type[Any]]  #: the operation's
    fields: ClassVar[tuple[str, ...]]  #: of `moments`, by the names of torch.optim's state
    shared_fields: ClassVar[tuple[str, ...]] = ()  #: those that all tasks have together

    _step_supports_amp_scaling: Any = property(amp.show)  #: GradScaler asks, and then looks at gradients
    _group: str | None = None  #: the name of process_group; groups cannot be pickled
    _kept: dict[Any, tuple[TaskStep, Any]]  #: by group and device, with the moments_dtype that state was made for

    def __init__(
        self,
        params: Any,
        *arguments: Any,
        task_options: TaskOptions,
        process_group: ProcessGroup | None,
        **settings: Any,
    ):
        self._task_options = task_options._asdict()
        self._group = name_of(type(self).__name__, process_group)
        self._kept = {}
        super().__init__(params, *arguments, **settings)

    # ---- for each rule to say ----------------------------------------------------------------------------------------

    def _names(self, group: dict[str, Any]) -> list[str]:
        """Return the moments that there are with a group's settings, some of `fields`."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> Any:
        """Return the operation's own settings."""
        raise NotImplementedError

    def _start(self, group: dict[str, Any]) -> float:
        """Return what a moment begins with."""
        return 0.0

    def _before_ordinary(self, group: dict[str, Any], p: Tensor) -> None:
        """Leave state as torch.optim expects to find it."""
        state = self.state.get(p, {})
        for name in (*self._names(group), "momentum_buffer"):
            if isinstance(state.get(name), Tensor) and state[name].dtype != p.dtype:  # moments_dtype was changed
                state[name] = state[name].to(p.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_group": self._group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept = {}

    # ---- torch.optim's interface -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in torch.optim; settings may differ from group to group, but for ``num_tasks`` and
        ``max_norm``.

        Args:
            param_group: ``"params"``, and settings where they are not the optimizer's.

        Raises:
            ValueError: a setting out of its range.
        """
        self.defaults.update(self.__dict__.pop("_task_options", {}))
        group = {**self.defaults, **param_group}
        check_group(type(self).__name__, group, self.param_groups)
        weights, dtype = group["task_weights"], group["moments_dtype"]
        param_group["task_weights"] = None if weights is None else [float(w) for w in weights]
        param_group["moments_dtype"] = None if dtype is None else moments_name(dtype)
        param_group.setdefault("tasks", self.param_groups[0]["tasks"] if self.param_groups else None)
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and ``.jac``.

        Args:
            set_to_none: ``.grad`` is None and ``.jac`` absent from then on; False: both are zero.
        """
        amp.put_back(self)
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                if hasattr(p, "jac") and (set_to_none or p.jac is None):
                    del p.jac
                elif hasattr(p, "jac"):
                    with still_averaged([p.jac]):
                        p.jac.zero_()
                    if (rows := rows_of(p.jac)) is not None:
                        rows.spent = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; a parameter's ``.grad`` is not read if it has ``.jac``. All is checked before anything changes.

        Args:
            closure: evaluates the model again and leaves ``.jac`` and ``.grad``.

        Returns:
            What ``closure`` returns; None without one.

        Raises:
            RuntimeError: a ``.jac`` is this rank's own, and not yet the mean; GradScaler steps, and ``.jac`` is scaled.
            ValueError: a ``.jac`` or ``.grad`` that does not fit, as the class says; what ``check_finite`` finds.

        Under data parallelism all ranks take the same step, and all must take it. Of parameters that ``fully_shard``
        shards every rank updates its shards.
        """
        amp.check_unscaled(self)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        jacobians, rows = self._in_order(self._jacobians())
        plans, key = [], 0
        for number, group in enumerate(self.param_groups):
            plans.append(self._plan(number, group, key))
            key += len(group["params"])
        pairs = list(zip(self.param_groups, plans, strict=True))
        check_averaged(f"{type(self).__name__}.step", jacobians, self._group)
        check_gradients(type(self).__name__, pairs)
        if (max_norm := self.param_groups[0].get("max_norm")) is not None:
            self._clip(max_norm)
        present = present_tasks(pairs)
        for group, plan in pairs:
            for p, _ in plan.ordinary:
                self._before_ordinary(group, p)
        if any(plan.ordinary for plan in plans):
            with gradients_of(plans):
                self._ordinary_step()
        totals = Totals()
        for number, (group, plan) in enumerate(pairs):
            for own in plan.tasks.by_device():
                self._update(number, group, own, group["num_tasks"], present.get(own.parameters[0].device), totals)
            for own in plan.single.by_device():
                self._update(number, group, own, None, None, totals)
        totals.add_up()
        for some in rows:
            some.spent = True
        return result

    def _in_order(self, jacobians: list[Tensor]) -> tuple[list[Tensor], set[Rows]]:
        """Return all ``.jac`` and what is known of their rows, after putting these in the order that the tasks' names
        had in the first step. What an earlier step has used, where others are new, is no gradient of this step's."""
        known = {rows_of(jacobian) for jacobian in jacobians}
        spent = {rows for rows in known if rows is not None and rows.spent}
        if spent and len(known) > len(spent):
            for p in itertools.chain(*(group["params"] for group in self.param_groups)):
                if hasattr(p, "jac") and rows_of(p.jac) in spent:
                    del p.jac
            return self._in_order(self._jacobians())
        for rows in known:
            if rows is None or rows.tasks is None:
                continue
            if self.param_groups[0].get("tasks") is None:
                for group in self.param_groups:
                    group["tasks"] = list(rows.tasks)
            tasks = self.param_groups[0]["tasks"]
            order = order_of(f"{type(self).__name__}.step", rows.tasks, tasks, "this optimizer's first step")
            if order is not None:
                reorder([jacobian for jacobian in jacobians if rows_of(jacobian) is rows], order)
        return jacobians, {rows for rows in map(rows_of, jacobians) if rows is not None}

    def _clip(self, max_norm: float) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        if with_rows := [p for p in every if hasattr(p, "jac")]:
            clip_rows(with_rows, max_norm)
        torch.nn.utils.clip_grad_norm_([p for p in every if not hasattr(p, "jac")], max_norm)

    @torch.no_grad()
    def init_state(self, shared: Iterable[Tensor]) -> None:
        """Make all state that first steps would make, and change nothing else: training goes on from there as it would
        have without.

        For ``torch.distributed.checkpoint``, which loads into the state that an optimizer has. ``get_state_dict`` and
        its like make a new optimizer's by a step with zero ``.grad`` everywhere, and would give the shared parameters
        moments as those of heads; call this before them. Parameters that require no gradient, or have state, are left
        out.

        Args:
            shared: the parameters that are to have ``.jac``, e.g. ``backbone.parameters()``.

        Raises:
            TypeError: one of them is no tensor.
            ValueError: one of them is not a parameter of this optimizer, or none requires a gradient.
        """
        where = f"{type(self).__name__}.init_state"
        per_task = set(parameter_list(where, "shared", shared))
        every = {p: group for group in self.param_groups for p in group["params"]}
        if others := per_task.difference(every):
            raise ValueError(
                f"{where}: shared: expected parameters of this optimizer, found {len(others)} others; take them from "
                "the module after fully_shard, which makes new ones"
            )
        new = {p: group for p, group in every.items() if p.requires_grad and not self.state.get(p)}
        gradients: dict[Tensor, Tensor | None] = dict.fromkeys(every)
        for p, group in new.items():
            if p in per_task and self._per_task(group):
                self._make_state(group, [p], group["num_tasks"])
            elif self._moment_dtype(group, p) != p.dtype:
                self._make_state(group, [p], None)
            else:
                self._before_ordinary(group, p)
                gradients[p] = torch.zeros_like(p)
        with as_gradients(gradients), standing_still(self.param_groups):
            self._ordinary_step()
        for p, gradient in gradients.items():
            if gradient is not None and "step" in self.state[p]:
                self.state[p]["step"].zero_()

    def _ordinary_step(self) -> None:
        # Without torch.optim's wrapper that runs hooks: they run around this class's own step.
        inspect.unwrap(self.ordinary.step)(self)

    def _jacobians(self) -> list[Tensor]:
        found = [getattr(p, "jac", None) for group in self.param_groups for p in group["params"]]
        return [jacobian for jacobian in found if jacobian is not None]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch.optim, but give moments the dtype of ``moments_dtype``, not the parameter's.

        Args:
            state_dict: of such an optimizer for as many tasks; its tensors are copied.

        Raises:
            ValueError: a state of another one, or of other parameters.
        """
        loaded: list[dict[str, Any]] = []
        self._kept.clear()

        def look(_: Any, state: dict[str, Any]) -> None:
            self._check_loaded(state)
            loaded.append(state)

        # Between the hooks of others: after those that change what is loaded, before those that look at the result.
        hooks = (
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(lambda _: self._take(loaded[-1]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        own = self.param_groups[0]
        for group in state_dict["param_groups"]:
            for name in ("num_tasks", "betas", "alpha", "lr_decay"):
                if (name in own) != (name in group):
                    found = f"one with {name}" if name in group else f"one without {name}"
                    expected = f"expected that of an {type(self).__name__}"
                    raise ValueError(f"{type(self).__name__}.load_state_dict: state_dict: {expected}, found {found}")
            if group["num_tasks"] != own["num_tasks"]:
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict: state_dict: expected num_tasks={own['num_tasks']}, found "
                    f"{group['num_tasks']}"
                )

    def _take(self, state_dict: dict[str, Any]) -> None:
        """State as it is in a checkpoint, where torch.optim gave moments their parameter's dtype."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        groups = [(group, p) for group in self.param_groups for p in group["params"]]
        for number, (group, p) in zip(numbers, groups, strict=True):
            values = state_dict["state"].get(number, {})
            per_task = f"{self._names(group)[0]}_0" in values
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    continue
                moment = value.shape == p.shape and name not in ("step", "update_square")
                dtype = self._moment_dtype(group, p) if moment else value.dtype
                device = p.device if moment or per_task else self.state[p][name].device
                # A copy: training on must not change the checkpoint that it was loaded from.
                self.state[p][name] = value.detach().to(device, dtype, copy=True)

    # ---- dominance ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dominance(self, layers: Layers | None = None) -> Tensor:
        r"""Return each task's share of what moved the parameters lately, per group or layer.

        .. math:: AU_t \leftarrow \beta \, AU_t + (1 - \beta) \, \|u_t\|^2, \qquad
            \text{share}_t = \frac{AU_t}{\sum_s AU_s}

        with :math:`u_t` the task's part of the update of the layer's parameters and :math:`\beta` ``dominance_decay``:
        the average of squared updates of arXiv 2211.15055, section 3, summed over a layer's elements (of shards: those
        of all ranks).

        Args:
            layers: for each layer its parameters, in a sequence or a dict; the parameter groups if not given.

        Returns:
            [layers, T] float64, rows summing to one, on the device of the parameters, unread by the host. NaN in rows
            without a parameter that was updated per task, as those of heads, or whose updates were all zero.

        Raises:
            RuntimeError: ``dominance_decay`` is None in a group.
        """
        tasks = int(self.param_groups[0]["num_tasks"])
        if any(group["dominance_decay"] is None for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.dominance: expected dominance_decay to be a number, found None in a group: "
                "nothing was recorded"
            )
        if layers is None:
            layers = [group["params"] for group in self.param_groups]
        return layer_shares(layers, tasks, lambda p: self.state.get(p, {}).get("update_square"))

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _plan(self, number: int, group: dict[str, Any], key: int) -> StepPlan:
        plan = StepPlan(TaskParameters([], [], []), TaskParameters([], [], []), [])
        parameters, tasks, first_moment = group["params"], group["num_tasks"], self._names(group)[0]
        jacobians: list[Any] = [getattr(p, "jac", None) for p in parameters]
        per_task = self._per_task(group)
        places = [i for i, jacobian in enumerate(jacobians) if jacobian is not None]
        chosen, found = [parameters[i] for i in places], [jacobians[i] for i in places]
        if not all_fit(chosen, found, tasks):
            for i in places:
                check_jacobian(self._where(number, i), parameters[i], jacobians[i], tasks)
        for i, p in enumerate(parameters):
            jacobian = jacobians[i]
            if jacobian is not None and per_task:
                state = self.state.get(p)
                if state and f"{first_moment}_0" not in state:
                    self._refuse_side(self._where(number, i), per_task)
                continue
            if jacobian is None and p.grad is None:
                continue
            where = self._where(number, i)
            if f"{first_moment}_0" in self.state.get(p, ()):
                self._refuse_side(where, False)
            gradient = cast("Tensor", p.grad if jacobian is None else only_row(p, jacobian))
            own_dtype = self._moment_dtype(group, p) == p.dtype
            if gradient.layout != torch.strided and not (own_dtype and self.takes_sparse):
                raise ValueError(f"{where}: expected a dense .grad, found {gradient.layout}; use sparse=False")
            if own_dtype:
                plan.ordinary.append((p, gradient))
                continue
            plan.single.parameters.append(p)
            plan.single.jacobians.append(gradient if is_sharded(p) else gradient.unsqueeze(0))
            plan.single.keys.append(key + i)
        if per_task:
            plan = plan._replace(tasks=TaskParameters(chosen, found, [key + i for i in places]))
        return plan

    def _where(self, number: int, i: int) -> str:
        return f"{type(self).__name__}.step: parameter {i} of group {number}"

    def _per_task(self, group: dict[str, Any]) -> bool:
        # One task alone is the ordinary optimizer, unless its update is weighted.
        return bool(group["num_tasks"] > 1 or group["task_weights"] not in (None, [1.0]))

    def _refuse_side(self, where: str, per_task: bool) -> None:
        """Refuse a parameter that changes sides: its moments would begin anew, unseen."""
        kept, found = (".grad", ".jac") if per_task else (".jac", ".grad without .jac")
        early = " (torch.distributed.checkpoint made them? then call init_state(shared) before it)" * per_task
        raise ValueError(
            f"{where}: expected {kept}, which its moments are made of, found {found}; to start them anew, delete "
            f"optimizer.state[parameter]{early}"
        )

    def _moment_dtype(self, group: dict[str, Any], p: Tensor) -> torch.dtype:
        if p.dtype not in (torch.float32, torch.bfloat16):
            return p.dtype
        return cast("torch.dtype", getattr(torch, moments_name(group["moments_dtype"] or "float32")))

    def _make_state(self, group: dict[str, Any], parameters: list[Tensor], tasks: int | None) -> None:
        """Make the state that there is none of yet, and give moments their dtype; without tasks: as torch.optim's."""
        names = self._state_names(group, tasks)
        for p in parameters:
            state, dtype = self.state[p], self._moment_dtype(group, p)
            for name in itertools.chain(*names):
                if name not in state:
                    start = self._start(group)
                    state[name] = torch.full_like(p, complex(start, start) if p.is_complex() else start, dtype=dtype)
                elif state[name].dtype != dtype:  # moments_dtype was changed
                    state[name] = state[name].to(dtype)
            shape = [] if tasks is None else [tasks]
            if "step" not in state:
                state["step"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            if "update_square" not in state and tasks is not None and group["dominance_decay"] is not None:
                state["update_square"] = torch.zeros(shape, dtype=torch.float64, device=p.device)

    def _state_names(self, group: dict[str, Any], tasks: int | None) -> list[list[str]]:
        """Return what each of `fields` is called in a parameter's state; an empty list: there is no such moment."""
        names = self._names(group)
        suffixes = [""] if tasks is None else [f"_{t}" for t in range(tasks)]
        return [
            [] if name not in names else [name] if name in self.shared_fields else [name + s for s in suffixes]
            for name in self.fields
        ]

    def _state_of(
        self, group: dict[str, Any], parameters: list[Tensor], tasks: int | None
    ) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """Return moments as `fields` has them, step counts and AU (none if not per task, or not asked for)."""
        states = [self.state[p] for p in parameters]
        moments = [[state[name] for state in states for name in names] for names in self._state_names(group, tasks)]
        averages = [] if tasks is None or group["dominance_decay"] is None else [s["update_square"] for s in states]
        return moments, [state["step"] for state in states], averages

    def _update(
        self,
        number: int,
        group: dict[str, Any],
        own: TaskParameters,
        tasks: int | None,
        present: Tensor | None,
        totals: Totals,
    ) -> None:
        """Update parameters of group `number`; without `tasks` these have one, and state as torch.optim's."""
        parameters, jacobians, keys = own
        place = number, parameters[0].device, tasks is None
        kept, moments_dtype = self._kept.get(place, (None, None))
        if kept is None or moments_dtype != group["moments_dtype"]:
            kept = TaskStep(self.operation)
            self._kept[place] = kept, group["moments_dtype"]
            self._make_state(group, parameters, tasks)
        try:
            moments, steps, squares = self._state_of(group, parameters, tasks)
        except KeyError:  # a parameter's first step
            self._make_state(group, parameters, tasks)
            moments, steps, squares = self._state_of(group, parameters, tasks)
        if not set(map(type, parameters)) <= {Tensor, torch.nn.Parameter} and any(map(is_sharded, parameters)):
            moments = [list(map(local, tensors)) for tensors in moments]
            squares = [totals.part(p, square) for p, square in zip(parameters, squares)]
            keys = [key_of_shard(key, p) for key, p in zip(keys, parameters)]
            jacobians = [local(j) if tasks else local(j).unsqueeze(0) if is_sharded(j) else j for j in jacobians]
            parameters = list(map(local, parameters))
        options: dict[str, Any] = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
        if tasks is None:
            steps = [step.view(1) for step in steps]
        else:
            options["task_weights"] = group["task_weights"]
            options["present"] = present if group["missing"] == "still" else None
            if squares:
                options["square_decay"] = group["dominance_decay"]
        if group["stochastic_rounding"] and group["moments_dtype"] == "bfloat16":
            options["keys"] = keys
        settings = step_settings(self.operation.name, tasks or 1, **options)
        kept(Step(parameters, jacobians, self.moments(*moments), steps, squares, self._rule(group), settings))
