"""What AdaTask's four optimizers have in common: which parameters take which rule, their state, and dominance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ..distributed.groups import name_of
from ..distributed.jacobians import check_averaged, still_averaged
from ..distributed.shards import is_sharded, local
from ..jacobian import parameter_list
from . import amp
from .checks import check_gradients, check_jacobian, present_tasks
from .dominance import Layers, layer_shares
from .options import TaskOptions, check_group, moments_name
from .plan import Own, Plan, as_gradients, gradients_of, standing_still
from .sharded import Totals, key_of_shard, only_row

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TaskOptimizer(torch.optim.Optimizer):
    """The first base of an optimizer whose other base is one of torch.optim.

    A parameter with ``.jac`` takes the rule per task; any other the ordinary one, by torch.optim's own code.
    """

    #: The optimizer of torch.optim for ordinary parameters.
    ordinary: ClassVar[type[torch.optim.Optimizer]]
    takes_sparse: ClassVar[bool] = False  #: whether that reads sparse gradients

    _step_supports_amp_scaling: Any = property(amp.show)  #: GradScaler asks, and then looks at gradients
    _group: str | None = None  #: the name of process_group; groups cannot be pickled

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
        super().__init__(params, *arguments, **settings)

    # ---- for each rule to say ----------------------------------------------------------------------------------------

    def _names(self, group: dict[str, Any]) -> list[str]:
        """The moments that a task has with a group's settings, by the names of torch.optim's state."""
        raise NotImplementedError

    def _common(self, group: dict[str, Any]) -> list[str]:
        """The moments that all tasks have together."""
        return []

    def _operate(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        jacobians: list[Tensor],
        moments: dict[str, list[list[Tensor]]],
        steps: list[Tensor],
        options: dict[str, Any],
    ) -> None:
        """Calls the operation of `mtlgrad.ops`; moments as `_names` has them, per parameter T tensors, and as `_common`
        has them, one."""
        raise NotImplementedError

    def _start(self, group: dict[str, Any]) -> float:
        """What a moment begins with."""
        return 0.0

    def _before_ordinary(self, group: dict[str, Any], p: Tensor) -> None:
        """Leaves state as torch.optim expects to find it."""
        state = self.state.get(p, {})
        for name in (*self._names(group), "momentum_buffer"):
            if isinstance(state.get(name), Tensor) and state[name].dtype != p.dtype:  # moments_dtype was changed
                state[name] = state[name].to(p.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_group": self._group}

    # ---- torch.optim's interface -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; all settings but ``num_tasks`` may differ from group to group."""
        self.defaults.update(self.__dict__.pop("_task_options", {}))
        group = {**self.defaults, **param_group}
        check_group(type(self).__name__, group, self.param_groups)
        weights, dtype = group["task_weights"], group["moments_dtype"]
        param_group["task_weights"] = None if weights is None else [float(w) for w in weights]
        param_group["moments_dtype"] = None if dtype is None else moments_name(dtype)
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad`` and ``.jac``, which is then absent (with ``set_to_none=False``: zero)."""
        amp.put_back(self)
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                if hasattr(p, "jac") and (set_to_none or p.jac is None):
                    del p.jac
                elif hasattr(p, "jac"):
                    with still_averaged([p.jac]):
                        p.jac.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a parameter's ``.grad`` is not read if it has ``.jac``. All is checked before anything changes.

        Args:
            closure: evaluates the model again and leaves ``.jac`` and ``.grad``; what it returns is returned.

        Under data parallelism all ranks take the same step, and all must take it. ``RuntimeError`` if a ``.jac`` is
        this rank's own, and not yet the mean. Of parameters that ``fully_shard`` shards every rank updates its shards.
        """
        amp.check_unscaled(self)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        plans, key = [], 0
        for number, group in enumerate(self.param_groups):
            plans.append(self._plan(number, group, key))
            key += len(group["params"])
        pairs = list(zip(self.param_groups, plans, strict=True))
        self._check_averaged()
        check_gradients(type(self).__name__, pairs)
        present = present_tasks(pairs)
        for group, plan in pairs:
            for p, _ in plan.ordinary:
                self._before_ordinary(group, p)
        with gradients_of(plans):
            self._ordinary_step()
        totals = Totals()
        for group, plan in pairs:
            for device in dict.fromkeys(own.parameter.device for own in (*plan.tasks, *plan.single)):
                here = [own for own in plan.tasks if own.parameter.device == device]
                self._update(group, here, group["num_tasks"], "_{}", present.get(device), totals)
                self._update(group, [own for own in plan.single if own.parameter.device == device], 1, "", None, totals)
        totals.add_up()
        return result

    @torch.no_grad()
    def init_state(self, shared: Iterable[Tensor]) -> None:
        """Makes all state that first steps would make, and changes nothing else: training goes on from there as it
        would have without.

        For ``torch.distributed.checkpoint``, which loads into the state that an optimizer has. ``get_state_dict`` and
        its like make a new optimizer's by a step with zero ``.grad`` everywhere, and would give the shared parameters
        moments as those of heads; call this before them. Parameters that require no gradient, or have state, are left
        out.

        Args:
            shared: the parameters that are to have ``.jac``, e.g. ``backbone.parameters()``.

        Raises:
            ValueError: one of them is not a parameter of this optimizer.
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
                self._state(group, [p], group["num_tasks"], "_{}")
            elif self._moment_dtype(group, p) != p.dtype:
                self._state(group, [p], 1, "")
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

    def _check_averaged(self, what: str = "step") -> None:
        check_averaged(f"{type(self).__name__}.{what}", self._jacobians(), self._group)

    def _jacobians(self) -> list[Tensor]:
        found = [getattr(p, "jac", None) for group in self.param_groups for p in group["params"]]
        return [jacobian for jacobian in found if jacobian is not None]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but that moments have the dtype of ``moments_dtype`` and not the parameter's."""
        loaded: list[dict[str, Any]] = []

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
        r"""Each task's share of what moved the parameters lately, per group or layer.

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

    def _plan(self, number: int, group: dict[str, Any], key: int) -> Plan:
        plan = Plan([], [], [])
        tasks, first_moment = group["num_tasks"], self._names(group)[0]
        for i, p in enumerate(group["params"]):
            jacobian = getattr(p, "jac", None)
            if jacobian is None and p.grad is None:
                continue
            where = f"{type(self).__name__}.step: parameter {i} of group {number}"
            if jacobian is not None:
                check_jacobian(where, p, jacobian, tasks)
            per_task = jacobian is not None and self._per_task(group)
            self._check_side(where, p, first_moment, per_task)
            if jacobian is not None and per_task:
                plan.tasks.append(Own(p, jacobian, key + i))
                continue
            gradient = cast("Tensor", p.grad if jacobian is None else only_row(p, jacobian))
            own_dtype = self._moment_dtype(group, p) == p.dtype
            if gradient.layout != torch.strided and not (own_dtype and self.takes_sparse):
                raise ValueError(f"{where}: expected a dense .grad, found {gradient.layout}; use sparse=False")
            if own_dtype:
                plan.ordinary.append((p, gradient))
            else:
                plan.single.append(Own(p, gradient if is_sharded(p) else gradient.unsqueeze(0), key + i))
        return plan

    def _per_task(self, group: dict[str, Any]) -> bool:
        # One task alone is the ordinary optimizer, unless its update is weighted.
        return bool(group["num_tasks"] > 1 or group["task_weights"] not in (None, [1.0]))

    def _check_side(self, where: str, p: Tensor, moment: str, per_task: bool) -> None:
        """A parameter cannot change sides: its moments would begin anew, unseen."""
        state = self.state.get(p)
        if state and (f"{moment}_0" in state) != per_task:
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

    def _moments(self, group: dict[str, Any], parameters: list[Tensor], names: list[str]) -> list[list[Tensor]]:
        """Per parameter the tensors of its state with these names; made where there are none yet."""
        found = []
        for p in parameters:
            state, dtype = self.state[p], self._moment_dtype(group, p)
            for name in names:
                if name not in state:
                    state[name] = torch.full_like(p, self._start(group), dtype=dtype)
                elif state[name].dtype != dtype:  # moments_dtype was changed
                    state[name] = state[name].to(dtype)
            found.append([state[name] for name in names])
        return found

    def _counts(self, parameters: list[Tensor], name: str, shape: list[int], dtype: torch.dtype) -> list[Tensor]:
        """Per parameter a small tensor of its state; made where there is none yet."""
        found = []
        for p in parameters:
            state = self.state[p]
            if name not in state:
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
            found.append(state[name])
        return found

    def _state(
        self, group: dict[str, Any], parameters: list[Tensor], tasks: int, suffix: str
    ) -> tuple[dict[str, list[list[Tensor]]], list[Tensor], list[Tensor]]:
        """Moments, step counts and AU (none if not per task, or not asked for); made where there are none yet."""
        moments = {
            name: self._moments(group, parameters, [name + suffix.format(t) for t in range(tasks)])
            for name in self._names(group)
        }
        moments |= {name: self._moments(group, parameters, [name]) for name in self._common(group)}
        steps = self._counts(parameters, "step", [tasks] if suffix else [], torch.float32)
        if not suffix or group["dominance_decay"] is None:
            return moments, steps, []
        return moments, steps, self._counts(parameters, "update_square", [tasks], torch.float64)

    def _update(
        self,
        group: dict[str, Any],
        owns: list[Own],
        tasks: int,
        suffix: str,
        present: Tensor | None,
        totals: Totals,
    ) -> None:
        if not owns:
            return
        parameters, jacobians, keys = map(list, zip(*owns, strict=True))
        moments, steps, squares = self._state(group, parameters, tasks, suffix)
        if any(map(is_sharded, parameters)):
            moments = {name: [list(map(local, row)) for row in rows] for name, rows in moments.items()}
            squares = [totals.part(p, square) for p, square in zip(parameters, squares)]
            keys = [key_of_shard(key, p) for key, p in zip(keys, parameters)]
            jacobians = [local(j) if suffix else local(j).unsqueeze(0) if is_sharded(j) else j for j in jacobians]
            parameters = list(map(local, parameters))
        options = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
        if suffix:
            options["task_weights"] = group["task_weights"]
            options["present"] = present if group["missing"] == "still" else None
            if squares:
                options["square_decay"], options["squares"] = group["dominance_decay"], squares
        else:
            steps = [step.view(1) for step in steps]
        if group["stochastic_rounding"] and any(self._moment_dtype(group, p) == torch.bfloat16 for p in parameters):
            options["keys"] = keys
        self._operate(group, parameters, jacobians, moments, steps, options)
