"""How an operation is declared: once, as an :class:`Operation`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from itertools import filterfalse
from operator import itemgetter
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._native import KERNELS
from .checks import refuse

_LIBRARY = torch.library.Library("mtlgrad", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def hide_from_dynamo(function: _Function) -> _Function:
    """Run the function as it is, with all that it calls, also where torch.compile looks at every Python function.

    Kernels get pointers, of which Dynamo knows nothing: where it takes a function apart it lets go of tensors before
    the kernel has read or written them. As ``torch.compiler.disable``, without importing Dynamo (3 s). Goes under other
    decorators: their code is shared with functions of others.

    Args:
        function: marked in place.

    Returns:
        The same function.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def define_operator(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator that torch.compile does not look into, for the host and CUDA.

    Args:
        schema: as torch.library's.
        kernel: runs with autocast off, which would turn the GEMMs before a kernel to half precision.
        fake: the version without values that is traced.

    Returns:
        ``torch.ops.mtlgrad.<name>.default``.
    """
    name = schema.partition("(")[0]

    @hide_from_dynamo
    @functools.wraps(kernel)
    def full_precision(*arguments: Any) -> Any:
        first = arguments[0]
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return kernel(*arguments)
        with torch.autocast(device_type, enabled=False):
            return kernel(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, full_precision, "CPU")
    _LIBRARY.impl(name, full_precision, "CUDA")
    torch.library.register_fake(f"mtlgrad::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mtlgrad, name).default


Changed = list[Tensor]  #: which an operation writes to

_TORCH_TYPES = {
    "Changed": "Changed",
    "list[Tensor]": "Tensor[]",
    "Tensor | None": "Tensor?",
    "list[float]": "float[]",
    "Scale": "str",
    "list[int] | None": "int[]?",
    **{name: name for name in ("float", "int", "bool")},
}


_TENSORS = ("Tensor", "Tensor?", "Tensor[]", "Changed")
#: What the kernel wrote to, as the schema has it; several tensors if it has none of these.
_RETURNED: dict[str, Callable[[list[Tensor]], Any]] = {
    "()": lambda out: None,
    "Tensor": itemgetter(0),
    "Tensor[]": lambda out: out,
}


def _fields(struct: Any) -> str:
    """Return a struct's fields, as a schema has them."""
    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in struct.__annotations__.items()}
    return ", ".join(f"{_TORCH_TYPES[kind]} {name}" for name, kind in kinds.items())


class Operation:
    """An operation, from which the operators of torch, their traced versions and the derivative follow.

    Args:
        schema, structs: as torch.library's; a class of ``structs`` stands for its fields, ``Changed`` for what is
            written.
        check: of all arguments; raises before anything is computed, in the real and in the traced version.
        kernel: ``kernel(kernels, *arguments, out)`` calls compiled code and writes to ``out``, a list of tensors, or
            returns NotImplemented for what that cannot take.
        reference: ``reference(*arguments)`` in plain PyTorch: where there are no kernels, and for derivatives.
        outputs: ``outputs(*arguments)`` allocates ``out``. None: the operation changes its arguments.
        check_out: ``check_out(out, *arguments)`` of an ``out`` that the caller gives, to :meth:`into`. None: none can
            be given.
        differentiable: whether calls have the derivative of ``reference``.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        outputs: Callable[..., list[Tensor]] | None = None,
        check_out: Callable[..., None] | None = None,
        structs: Sequence[Any] = (),
        differentiable: bool = False,
    ):
        self._check, self._kernel, self._reference, self._outputs = check, kernel, reference, outputs
        self._check_out, self._differentiable = check_out, differentiable
        head, _, returns = schema.partition(" -> ")
        self._returned = _RETURNED.get(returns, tuple)
        self.name, _, listed = head.rstrip(")").partition("(")
        kinds = {kind.__name__: kind for kind in structs}
        texts = listed.split(", ")
        self._structs: list[Any] = [kinds.get(text.split()[0]) for text in texts]
        whole = ", ".join(_fields(struct) if struct else text for struct, text in zip(self._structs, texts))
        flat = [text.split()[0] for text in whole.split(", ")]
        #: Where tensors are among the flat arguments, and whether in a list.
        self._tensors = [(i, kind in ("Tensor[]", "Changed")) for i, kind in enumerate(flat) if kind in _TENSORS]
        self._changed = [i for i, kind in enumerate(flat) if kind == "Changed"]
        expanded = re.sub(r"Changed (\w+)", r"Tensor(\1!)[] \1", whole)
        self._operator = define_operator(f"{self.name}({expanded}) -> {returns}", self._run, self._fake)
        if check_out is not None:
            like = f"{self.name}_like({expanded}, Tensor[] out) -> Tensor[]"
            self._operator_like = define_operator(like, self._run_like, self._fake_like)

    def __call__(self, *arguments: Any) -> Any:
        """Return what the schema does; new tensors."""
        flat = self._flat(arguments)
        leaves = self._leaves(flat)
        if not self._differentiable:
            if is_eager(leaves):
                return self._directly(leaves[0].device.type, arguments)
            with torch.no_grad():
                return self._operator(*flat)
        if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):  # noqa: C419
            return _ViaReference.apply(
                lambda *some: self._operator(*self._with_leaves(flat, some)),
                lambda *some: self._reference(*self._arguments(self._with_leaves(flat, some))),
                *leaves,
            )
        return self._directly(leaves[0].device.type, arguments) if is_eager(leaves) else self._operator(*flat)

    def into(self, out: list[Tensor], *arguments: Any) -> None:
        """Write to ``out``; not differentiable.

        Traced, by copies: of an operator that changes a view, inductor loses an offset that depends on a dynamic size.

        Args:
            out: tensors that ``check_out`` accepts.
            arguments: as in a call.
        """
        flat = self._flat(arguments)
        leaves = self._leaves(flat)
        if is_eager([*leaves, *out]):
            self._directly(leaves[0].device.type, arguments, out)
            return
        with torch.no_grad():
            for target, value in zip(out, self._operator_like(*flat, out), strict=True):
                target.copy_(value)

    # ---- between arguments and the operators' flat lists of them ----

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for struct, argument in zip(self._structs, arguments, strict=True):
            for value in argument if struct else (argument,):  # Dynamo extends no list by a struct
                flat.append(value)  # noqa: PERF402
        return flat

    def _arguments(self, flat: Sequence[Any]) -> list[Any]:
        rest = iter(flat)
        return [
            struct(*(next(rest) for _ in struct.__annotations__)) if struct else next(rest) for struct in self._structs
        ]

    def _leaves(self, flat: Sequence[Any]) -> list[Tensor]:
        found: list[Tensor] = []
        for i, listed in self._tensors:
            if listed:
                found += flat[i]
            elif flat[i] is not None:
                found.append(flat[i])
        return found

    def _with_leaves(self, flat: Sequence[Any], leaves: Sequence[Tensor]) -> list[Any]:
        """`flat` with other tensors in the places of its own."""
        rest, found = iter(leaves), list(flat)
        for i, listed in self._tensors:
            if listed:
                found[i] = [next(rest) for _ in flat[i]]
            elif flat[i] is not None:
                found[i] = next(rest)
        return found

    # ---- the operators ----

    @hide_from_dynamo
    def _directly(self, device_type: str, arguments: Sequence[Any], out: list[Tensor] | None = None) -> Any:
        """Compute without torch's dispatcher, which costs the host 20 us: where nobody but this would look."""
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._directly(device_type, arguments, out)
        self._check(*arguments)
        if out is not None:
            self._check_out(out, *arguments)  # type: ignore[misc]
            self._compute(device_type, arguments, out)
            return mark_written(out)
        made: list[Tensor] = [] if self._outputs is None else self._outputs(*arguments)
        self._compute(device_type, arguments, made)
        return self._returned(made)

    def _run(self, *flat: Any) -> Any:
        return self._directly(self._leaves(flat)[0].device.type, self._arguments(flat))

    def _fake(self, *flat: Any) -> Any:
        arguments = self._arguments(flat)
        self._check(*arguments)
        changed = [tensor for i in self._changed for tensor in flat[i] if tensor._is_view()]
        if any(isinstance(tensor.storage_offset(), torch.SymInt) for tensor in changed):
            refuse(
                f"{self.name}: expected to change tensors at fixed places, found a view at an offset that depends on a "
                "dynamic size, which inductor would lose; compile with dynamic=False"
            )
        return None if self._outputs is None else self._returned(self._outputs(*arguments))

    def _run_like(self, *flat: Any) -> list[Tensor]:
        made = self._fake_like(*flat)
        self._directly(made[0].device.type, self._arguments(flat[:-1]), made)
        return made

    def _fake_like(self, *flat: Any) -> list[Tensor]:
        arguments, out = self._arguments(flat[:-1]), flat[-1]
        self._check(*arguments)
        self._check_out(out, *arguments)  # type: ignore[misc]
        return list(map(torch.empty_like, out))

    def _compute(self, device_type: str, arguments: Sequence[Any], out: list[Tensor]) -> None:
        kernels: ModuleType | None = KERNELS.get(device_type)
        if kernels is None or self._kernel(kernels, *arguments, out) is NotImplemented:
            with torch.no_grad():
                found = self._reference(*arguments)
                for target, value in zip(out, [found] if isinstance(found, Tensor) else found or (), strict=True):
                    target.copy_(value)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody follows what is done with the tensors: no tracer, no mode, no transform, no subclass."""
    functorch = torch._C._functorch
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and functorch.peek_interpreter_stack() is None
        and not functorch.is_legacy_batchedtensor(tensors[0])  # of is_grads_batched
        and _PLAIN.issuperset(map(type, tensors))
    )


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel has written them: what it may have saved for a backward is gone."""
    ordinary = list(filterfalse(Tensor.is_inference, tensors))
    torch.autograd.graph.increment_version(ordinary)


# ---- derivatives -----------------------------------------------------------------------------------------------------


class _ViaReference(torch.autograd.Function):
    """The kernels go forward, the reference's derivative comes back."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], reference: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        found = op(*tensors)
        return tuple(found) if isinstance(found, list) else found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = ctx.saved_tensors
        active = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def reference(*some: Tensor) -> Any:
            full = list(tensors)
            for i, tensor in zip(active, some):
                full[i] = tensor
            found = ctx.reference(*full)
            return tuple(found) if isinstance(found, list) else found

        like, pull_back, *_ = torch.func.vjp(reference, *(tensors[i] for i in active))
        found = pull_back(gradients if isinstance(like, tuple) else gradients[0])
        result: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(active, found):
            result[i] = gradient
        return None, None, *result
