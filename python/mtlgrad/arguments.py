"""What users hand to more than one method: losses, one a task, and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


def check_tensor(op: str, name: str, value: object) -> None:
    """Refuse what a backbone returned in the place of a tensor, or stands for one in a trace."""
    if isinstance(value, Tensor):
        return
    found, way = type(value).__name__, ""
    if isinstance(value, fx.Proxy):
        way = "; torch.fx cannot follow what happens in the backward: use torch.export, in evaluation mode"
    elif hasattr(value, "last_hidden_state"):
        way = f"; use {name}.last_hidden_state"
    elif isinstance(value, (list, tuple)):
        way = f"; use one of its {len(value)} parts"
    raise TypeError(f"{op}: {name}: expected a tensor, found {found}{way}")


class NotScripted:
    """A module that torch.jit.script cannot compile, and says so before it tries."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: expected a module that torch.jit.script can compile, found one that acts in the "
            "backward; use torch.export, or torch.jit.trace, in evaluation mode"
        )


def named_losses(op: str, losses: Losses) -> tuple[list[str], list[Tensor | None]]:
    """Return names for messages, and the losses in order; every one a scalar, or None for a task that is absent."""
    if isinstance(losses, Tensor):
        raise TypeError(
            f"{op}: losses: expected a sequence or a dict of scalar losses, one a task, found one tensor; "
            "use list(losses) for a tensor [T]"
        )
    if isinstance(losses, Mapping):
        names, values = [f"task {name!r}" for name in losses], list(losses.values())
    else:
        values = list(losses)
        names = [f"task {t}" for t in range(len(values))]
    if not values:
        raise ValueError(f"{op}: losses: expected at least one, found none")
    for name, loss in zip(names, values, strict=True):
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(f"{op}: losses: expected a tensor for {name}, found {type(loss).__name__}")
        if loss is not None and loss.numel() != 1:
            raise ValueError(
                f"{op}: losses: expected a scalar for {name}, found shape {list(loss.shape)}; use loss.mean()"
            )
    return names, values


def parameter_list(op: str, name: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that want gradients, each once."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    found = list(dict.fromkeys(parameters))
    for p in found:
        if not isinstance(p, Tensor):
            raise TypeError(f"{op}: {name}: expected tensors, found {type(p).__name__}; use module.parameters()")
        if p.requires_grad and not p.is_leaf:
            raise ValueError(f"{op}: {name}: expected leaf tensors, found the result of an operation {list(p.shape)}")
    wanted = [p for p in found if p.requires_grad]
    if not wanted:
        raise ValueError(f"{op}: {name}: expected at least one parameter that requires a gradient, found none")
    return wanted
