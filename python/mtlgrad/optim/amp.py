"""``torch.amp.GradScaler`` and ``.jac``.

GradScaler walks over ``.grad`` of an optimizer's parameters and hands what it finds to one operation, which divides by
the scale and looks for infinities. It asks for ``_step_supports_amp_scaling`` before; then a stand-in for ``.jac`` is
laid where it looks: a tensor whose ``__torch_function__`` is given that operation's arguments, and takes itself away.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.utils._pytree import tree_map_only

from ..ops.rows import as_real
from ..world.jacobians import check_averaged, still_averaged
from ..world.shards import is_sharded, local, shard_groups, sum_over

if TYPE_CHECKING:
    from .base import TaskOptimizer

_ORDER = (
    "call scaler.unscale_(optimizer), unscale_jac_(scaler, optimizer), clip_task_grad_norm_ and scaler.step(optimizer) "
    "in this order"
)

# ---- a GradScaler that looks at gradients ----------------------------------------------------------------------------


class _StandIn(Tensor):
    """A gradient of zeros, in the place of all ``.jac`` of its device and dtype."""

    optimizer: TaskOptimizer
    zeros: Tensor  #: what others than GradScaler see
    kept: Tensor | None  #: the parameter's own .grad

    @classmethod
    def of(cls, optimizer: TaskOptimizer, p: Tensor) -> _StandIn:
        zeros = torch.zeros_like(p.detach())
        # A DTensor cannot be made one of this class; .grad needs the whole parameter's shape, and no memory for it.
        shown = local(zeros).new_zeros(()).expand(p.shape) if is_sharded(p) else zeros
        made = shown.as_subclass(cls)
        made.optimizer, made.zeros, made.kept = optimizer, zeros, p.grad
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch._amp_foreach_non_finite_check_and_unscale_:
            [found] = [gradient for gradient in args[0] if isinstance(gradient, cls)]
            return found._unscale(*args)
        args, kwargs = tree_map_only(cls, lambda found: found.zeros, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _unscale(self, gradients: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
        put_back(self.optimizer)
        name = type(self.optimizer).__name__
        jacobians = [p.jac for p in _with_jacobians(self.optimizer).get((self.zeros.device, self.zeros.dtype), [])]  # type: ignore[attr-defined]
        # Before: ranks that looked for infinities in what is their own would not skip the same steps.
        check_averaged(f"{name} (GradScaler.unscale_)", jacobians, self.optimizer._group)
        if any(getattr(jacobian, "_clipped", None) == _version(jacobian) for jacobian in jacobians):
            raise RuntimeError(
                f"{name} (GradScaler.unscale_): expected .jac to be unscaled before it is clipped, found "
                f"clip_task_grad_norm_ called before; {_ORDER}"
            )
        others = [gradient for gradient in (*gradients, self.kept) if gradient is not None and gradient is not self]
        seen = [*jacobians, *others]
        with still_averaged(jacobians):
            values = [tensor._values() if tensor.is_sparse else local(tensor) for tensor in seen]
            torch._amp_foreach_non_finite_check_and_unscale_(as_real(values), found_inf, inv_scale)
        for groups in dict.fromkeys(map(shard_groups, filter(is_sharded, seen))):
            sum_over(found_inf, groups).clamp_(max=1.0)
        for jacobian in jacobians:
            # GradScaler holds found_inf until update(): .jac that is kept longer counts as scaled again, as .grad does.
            jacobian._unscaled = (_version(jacobian), weakref.ref(found_inf))


def _with_jacobians(optimizer: TaskOptimizer) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Return the parameters with ``.jac``, by what GradScaler unscales in one call."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(getattr(p, "jac", None), Tensor):
                found.setdefault((p.device, p.dtype), []).append(p)
    return found


def _hosts(optimizer: TaskOptimizer) -> list[Tensor]:
    """Choose a small parameter for each device and dtype of ``.jac`` still scaled, without ``.grad`` where it can."""
    return [
        min(parameters, key=lambda p: (p.grad is not None, p.numel()))
        for parameters in _with_jacobians(optimizer).values()
        if not all(_is_unscaled(p.jac) for p in parameters)  # type: ignore[attr-defined]
    ]


def show(optimizer: TaskOptimizer) -> bool:
    """Lay stand-ins for ``.jac`` that is still scaled. Return False: the step itself unscales nothing, and is not to be
    called if there are infinities.

    If it was not GradScaler who asked, one parameter of each device and dtype has ``.grad`` of zeros in the place of
    its own, until ``step`` or ``zero_grad``.
    """
    put_back(optimizer)
    shown = [(p, _StandIn.of(optimizer, p)) for p in _hosts(optimizer)]
    for p, stand_in in shown:
        p.grad = stand_in
    if shown:
        optimizer.__dict__["_shown"] = shown
    return False


def put_back(optimizer: TaskOptimizer) -> bool:
    """Take stand-ins away; return whether there were any, at which GradScaler has not looked."""
    shown = optimizer.__dict__.pop("_shown", ())
    for p, stand_in in shown:
        if p.grad is stand_in:
            p.grad = stand_in.kept
    return bool(shown)


def check_unscaled(optimizer: TaskOptimizer) -> None:
    """RuntimeError if it is GradScaler that steps, and ``.jac`` is still scaled: it had unscaled ``.grad`` before."""
    # Others may have asked and not looked, too: Lightning does before it clips .grad.
    if put_back(optimizer) and _within_scaler():
        raise RuntimeError(
            f"{type(optimizer).__name__}.step: expected unscaled .jac, found it scaled, for scaler.unscale_(optimizer) "
            f"alone was called, which sees .grad; {_ORDER}"
        )


def _within_scaler() -> bool:
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), GradScaler):
        frame = frame.f_back
    return frame is not None


# ---- what was unscaled, or clipped before ----------------------------------------------------------------------------


def _version(jacobian: Tensor) -> int:
    return local(jacobian)._version


def _is_unscaled(jacobian: Tensor) -> bool:
    """Whether it was unscaled for this step, and nothing but clipping has changed it since."""
    mark = getattr(jacobian, "_unscaled", None)
    return mark is not None and mark[0] == _version(jacobian) and mark[1]() is not None


@contextmanager
def clipping(jacobians: Sequence[Tensor]) -> Iterator[None]:
    """Mark what is clipped inside, as unscaled still, or as what must not be unscaled any more."""
    unscaled = [_is_unscaled(jacobian) for jacobian in jacobians]
    yield
    for jacobian, good in zip(jacobians, unscaled, strict=True):
        if good:
            jacobian._unscaled = (_version(jacobian), jacobian._unscaled[1])  # type: ignore[attr-defined]
        else:
            jacobian._clipped = _version(jacobian)  # type: ignore[attr-defined]


# ---- by hand ---------------------------------------------------------------------------------------------------------


class _Alone:
    """An optimizer as GradScaler looks at it, of which it sees ``.jac`` and no ``.grad``."""

    def __init__(self, optimizer: TaskOptimizer):
        carriers = [torch.zeros((), dtype=p.dtype, device=p.device) for p in _hosts(optimizer)]
        for carrier in carriers:
            carrier.grad = _StandIn.of(optimizer, carrier)
        self.param_groups = [{"params": carriers}] if carriers else []


def unscale_jac_(scaler: GradScaler | None, optimizer: Any) -> None:
    """Divide ``.jac`` by the scale, in place, for what reads it before the step::

        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
        clip_task_grad_norm_(backbone.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    ``scaler.step`` alone needs none of this. An infinity in ``.jac`` skips the step and makes the scale fall, as one in
    ``.grad`` does.

    Args:
        scaler: nothing happens if it is None or disabled.
        optimizer: one of this package's, or what Accelerate or Lightning made of it.

    Raises:
        RuntimeError: the order is another; or ``.jac`` is this rank's own, and not yet the mean.
        TypeError: the optimizer is another.
        ValueError: no parameter has ``.jac``.
    """
    from .base import TaskOptimizer

    while not isinstance(optimizer, TaskOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"unscale_jac_: optimizer: expected one of mtlgrad.optim, found {type(optimizer).__name__}, for which "
                "scaler.unscale_ is enough"
            )
        optimizer = optimizer.optimizer
    if scaler is None or not scaler.is_enabled():
        return
    if not _with_jacobians(optimizer):
        raise ValueError(
            "unscale_jac_: optimizer: expected at least one parameter with .jac, found none; call task_backward first"
        )
    states, last = scaler._per_optimizer_states, optimizer.__dict__.get("_alone")
    stage = states[id(optimizer)]["stage"] if id(optimizer) in states else OptState.READY
    again = last is not None and id(last) in states
    if again or stage is not OptState.UNSCALED:
        found = "a second call" if again else "none to that" if stage is OptState.READY else "one to scaler.step"
        raise RuntimeError(
            f"unscale_jac_: expected a call to scaler.unscale_(optimizer) and none to this function since the last "
            f"scaler.update(), found {found}; {_ORDER}"
        )
    alone = _Alone(optimizer)
    if not alone.param_groups:
        return  # Lightning has GradScaler see .jac when it unscales .grad
    scaler.unscale_(alone)  # type: ignore[arg-type]
    alone.param_groups.clear()
    optimizer.__dict__["_alone"] = alone  # GradScaler knows it by its address, until update()
    noted = states[id(optimizer)]["found_inf_per_device"]
    for device, infinite in states[id(alone)]["found_inf_per_device"].items():
        noted[device] = noted[device] + infinite if device in noted else infinite
