"""Aligned-MTL (Senushkin et al., CVPR 2023, arXiv 2305.19000): task gradients made orthogonal and equally long."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops
from .arguments import Losses, NotScripted, check_tensor, named_losses, parameter_list
from .graph import check_ordinary_autograd, goes_on, in_a_trace, leaves_of
from .jacobian import order_of, reorder, rows_of
from .ops.align import SCALES, AlignResult, Scale, empty_result
from .traced import copies, stand_ins
from .world.jacobians import check_averaged
from .world.ranks import ALONE, World, name_of, world_of
from .world.shards import by_groups, is_sharded, like_sharded, local, sum_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AlignedMTL(NotScripted, nn.Module):
    r"""Aligned-MTL in three forms, each around the same T x T alignment (:func:`mtlgrad.ops.align`).

    - ``z = aligned(features)``: a layer between backbone and heads (the paper's upper-bound form, of the gradient at
      the shared representation). One ordinary ``loss.backward()``.
    - :meth:`merge`: ``.jac`` of parameters (:func:`mtlgrad.task_backward`, or TorchJD) to ``.grad``.
    - :meth:`weigh`: task weights first, then one backward of the weighted sum, by whatever trainer.

    With G the tasks' gradients as columns, the update is G B p: B makes the columns of G B orthogonal and of one
    length, p is the preference. A positive factor common to all losses (a loss scale) goes through unchanged.

    Args:
        num_tasks: T.
        preference: p, [T], finite and not negative; ones if not given (as in the published code; 1/T in the paper's
            text differs from it by a factor T).
        scale: the length of the aligned gradients: the smallest singular value of G (``"min"``), the median one or
            their root mean square (``"rmse"``).
        scale_heads: multiplies each head's gradient by its task's weight too, as the published code can: give
            ``heads=`` to :meth:`merge`. :meth:`weigh` always does, for its weights go into the losses; the layer
            cannot, since the heads have their gradients before the weights exist.
        rtol: eigenvalues of the Gram matrix below rtol times the largest are taken for zero (default T x 1.2e-7).
        check_finite: raises ``ValueError`` naming the task whose gradient has NaN or infinity; this reads from the
            device. Without it the merged gradient is NaN.
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised. The
            alignment is then that of the gradients of all ranks' examples, as one process would make it: the layer and
            ``weigh(losses, features)`` sum the ranks' Gram matrices, T x T numbers; ``merge`` needs nothing for
            ``.jac`` that :func:`mtlgrad.task_backward` left, which is the mean already.

    After each use, float64 (the rank int64), on the gradients' device, unread by the host (None before the first use,
    NaN between the layer's first forward and its backward; in a forward without gradients there is no use):

    Attributes:
        weights: [T], the tasks' weights B p.
        singular_values: [T], of G, descending.
        rank: []; below T where gradients are dependent or a task is absent. With ``scale="min"`` the update jumps when
            it changes.
        condition_number: [], the largest singular value over the smallest.
    """

    def __init__(
        self,
        num_tasks: int,
        preference: Tensor | Sequence[float] | None = None,
        scale: Scale = "min",
        scale_heads: bool = False,
        *,
        rtol: float | None = None,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"AlignedMTL: num_tasks: expected at least 1, found {num_tasks}")
        if scale not in SCALES:
            raise ValueError(f"AlignedMTL: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
        self.num_tasks = num_tasks
        self.preference = _checked_preference(preference, num_tasks)
        self.scale: Scale = scale
        self.scale_heads = scale_heads
        self.rtol = rtol
        self.check_finite = check_finite
        self._group = name_of("AlignedMTL", process_group)
        # Not buffers, which .half() would round. Operators write in place, as torch.compile and CUDA graphs need.
        # Here, and not at the first use: what a traced forward creates, its backward could not write to.
        self._used = False
        self._told: set[str] = set()  # what was warned of
        self._alone = 0  # backwards of one task alone, in a row
        self._watched: tuple[int, int] | None = None  # in evaluation mode: which parameter, and its version
        self._tasks: tuple[str, ...] | None = None  # the names in the order of the first use that had some
        self._prepare(torch.get_default_device())

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, preference={self.preference}, scale={self.scale!r}"

    @property
    def weights(self) -> Tensor | None:
        return self._latest("weights")

    @property
    def singular_values(self) -> Tensor | None:
        return self._latest("singular_values")

    @property
    def rank(self) -> Tensor | None:
        return self._latest("rank")

    @property
    def condition_number(self) -> Tensor | None:
        return self._latest("condition_number")

    def _latest(self, name: str) -> Tensor | None:
        # A copy: the next step writes to the same memory.
        return copies([getattr(self._result, name)])[0] if self._used else None

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """T views of the features, one per head: view t goes to head t, and to nothing else.

        In the backward the T gradients that arrive meet here, and their aligned sum goes on into the backbone. A view
        that no loss uses has a zero gradient. All losses must come back in one backward: add them up. In evaluation
        mode, or without gradients, the views are all there is; ``weights`` are NaN after the former.

        Under data parallelism every rank must take part in the backward, even one whose losses are all zero.

        Args:
            features: [B, ...], any floating or complex dtype; of several ranks each its own part of the batch.
        """
        if self.scale_heads:
            raise RuntimeError(
                "AlignedMTL: scale_heads: expected False in the layer, found True: heads have their gradients before "
                "the weights exist; use weigh(losses, features), or task_backward and merge(parameters, heads=...)"
            )
        check_tensor("AlignedMTL", "features", features)
        if not features.is_floating_point() and not features.is_complex():
            raise TypeError(f"AlignedMTL: features: expected a floating or complex dtype, found {features.dtype}")
        if not (self.training and torch.is_grad_enabled() and features.requires_grad):
            if torch.is_grad_enabled() and features.requires_grad and not in_a_trace():
                self._note_evaluation(features)
            return tuple(features.view_as(features) for _ in range(self.num_tasks))
        check_ordinary_autograd("AlignedMTL")
        self._use(features.device)
        object.__setattr__(self, "_watched", None)
        return _Views.apply(features, self, world_of(self._group))

    def _note_evaluation(self, features: Tensor) -> None:
        """Of a forward in evaluation mode with gradients: for a look at them, or in a training that is not aligned,
        between whose forwards parameters move."""
        self._result.weights.fill_(torch.nan)
        parameter = next((p for p in leaves_of([features], set()) if isinstance(p, nn.Parameter)), None)
        before, now = self._watched, None if parameter is None else (id(parameter), parameter._version)
        object.__setattr__(self, "_watched", now)
        if before is not None and now is not None and before[0] == now[0] and before[1] < now[1]:
            self._tell(
                "AlignedMTL: expected to be trained in training mode, found parameters that moved between forwards in "
                "evaluation mode, where nothing is aligned; call aligned.train() (to freeze BatchNorm put those layers "
                "alone into eval())"
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=4)

    def _note_arrived(self, count: int) -> None:
        """Of a backward in which so many views had a gradient."""
        alone = self._alone + 1 if count == 1 and self.num_tasks > 1 else 0
        object.__setattr__(self, "_alone", alone)
        if alone == max(3, self.num_tasks):
            self._tell(
                f"AlignedMTL: expected the gradients of {self.num_tasks} tasks in a backward, found that of one alone, "
                f"{alone} times in a row: nothing is aligned; call the layer once for all tasks' examples and add the "
                "losses up, or use task_backward and merge"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> AlignedMTL:
        super()._apply(fn, recurse)
        device = fn(self._result.weights).device
        if device != self._result.weights.device:
            self._prepare(device)
        return self

    def _prepare(self, device: torch.device) -> None:
        """Memory on the device, once: a copy at each use would wait for the host, and could not be captured."""
        self._result: AlignResult = empty_result(self.num_tasks, device)
        self._preference: Tensor | None = None
        if self.preference is not None:
            self._preference = torch.tensor(self.preference, dtype=torch.float64, device=device)
        self._task_merge = ops.TaskMerge(self._result, self._preference)

    def _use(self, device: torch.device) -> None:
        if self._result.weights.device != device:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"AlignedMTL: expected to be on {device} like its input before it is compiled, found "
                    f"{self._result.weights.device}; use aligned.to(device)"
                )
            self._prepare(device)
        object.__setattr__(self, "_used", True)  # past the module's own, which looks for parameters

    def _merge(self, rows: list[Tensor] | ops.Stacked, world: World = ALONE) -> Any:
        """Return the aligned sum of the rows; of several ranks, which have other columns of G each, this rank's."""
        if world.size == 1:
            if isinstance(rows, list) and not self.check_finite:
                return self._task_merge(rows, self.scale, self.rtol)
            options: dict[str, Any] = {"check_finite": self.check_finite, "result": self._result}
            return ops.merge(rows, self._preference, self.scale, self.rtol, **options)[0]
        self._align(ops.gram(rows), world)
        return ops.combine(rows, self._result.weights)

    def _align(self, gram: Tensor, world: World = ALONE) -> None:
        # Gradients are averaged over the ranks later on, so every rank's are W times its part of the batch's.
        gram = world.sum_(gram) / world.size**2
        ops.align(gram, self._preference, self.scale, self.rtol, check_finite=self.check_finite, out=self._result)

    @torch.no_grad()
    def merge(
        self,
        parameters: Iterable[Tensor],
        retain_jac: bool = False,
        *,
        heads: Sequence[Iterable[Tensor]] | None = None,
    ) -> None:
        """``.jac`` to ``.grad``: the aligned sum is added to what ``.grad`` holds, and ``.jac`` is deleted.

        All the parameters are aligned as one system. Those without ``.jac`` are left alone.

        Args:
            parameters: leaves with ``.jac`` [T, *shape], of :func:`mtlgrad.task_backward` or TorchJD (under data
                parallelism: after :func:`mtlgrad.distributed.average_jacobians`). Of parameters that ``fully_shard``
                shards every rank merges its own shards, with one all-reduce of T x T numbers.
            retain_jac: keeps ``.jac``.
            heads: with ``scale_heads``, for each task its head's parameters; their ``.grad`` is multiplied by the
                task's weight.
        """
        if self.scale_heads != (heads is not None):
            raise ValueError(
                "AlignedMTL.merge: heads: expected the heads' parameters, one iterable a task, exactly if "
                f"scale_heads=True, found scale_heads={self.scale_heads} and {'none' if heads is None else 'some'}"
            )
        wanted = [p for p in parameter_list("AlignedMTL.merge", "parameters", parameters) if hasattr(p, "jac")]
        if not wanted:
            raise ValueError(
                "AlignedMTL.merge: parameters: expected at least one with .jac, found none; call task_backward first"
            )
        for p in wanted:
            if p.jac.shape != (self.num_tasks, *p.shape):
                raise ValueError(
                    f"AlignedMTL.merge: parameters: expected .jac of shape {[self.num_tasks, *p.shape]}, "
                    f"found {list(p.jac.shape)}"
                )
        check_averaged("AlignedMTL.merge", [p.jac for p in wanted], self._group)
        every = {rows for p in wanted if (rows := rows_of(p.jac)) is not None}
        for rows in every:
            if rows.tasks is not None and (order := self._order("AlignedMTL.merge", rows.tasks)) is not None:
                reorder([p.jac for p in wanted if rows_of(p.jac) is rows], order)
        listed = [] if heads is None else self._listed(heads, wanted)
        self._use(wanted[0].device)
        for p, gradient in zip(wanted, self._merge_shards(wanted), strict=True):
            gradient = gradient.to(p.dtype)
            if p.grad is None:
                p.grad = like_sharded(gradient, p) if is_sharded(p) else gradient
            else:
                local(p.grad).add_(gradient)
            if not retain_jac:
                del p.jac
            elif (rows := rows_of(p.jac)) is not None:
                rows.spent = True
        for head, weight in zip(listed, self._result.weights):
            for p in head:
                if p.grad is not None:
                    local(p.grad).mul_(weight.to(p.grad.dtype))

    def _merge_shards(self, parameters: list[Any]) -> Any:
        rows = [local(p.jac) for p in parameters]
        groups = by_groups(parameters)
        if not any(groups):
            return self._merge(ops.Stacked(rows))
        gram = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64, device=rows[0].device)
        for shared, places in groups.items():
            gram += sum_over(ops.gram(ops.Stacked([rows[i] for i in places])), shared)
        self._align(gram)
        return ops.combine(ops.Stacked(rows), self._result.weights)

    def _listed(self, heads: Sequence[Iterable[Tensor]], shared: Sequence[Tensor]) -> list[list[Tensor]]:
        listed = [list(head) for head in heads]
        if len(listed) != self.num_tasks:
            raise ValueError(f"AlignedMTL.merge: heads: expected {self.num_tasks}, found {len(listed)}")
        every = [p for head in listed for p in head]
        if len(set(every)) < len(every):
            raise ValueError("AlignedMTL.merge: heads: expected every parameter in one head, found one in two")
        if set(every).intersection(shared):
            raise ValueError("AlignedMTL.merge: heads: expected parameters without .jac, found one of those to merge")
        return listed

    def weigh(self, losses: Losses, shared: Tensor | Iterable[Tensor]) -> Tensor:
        """Weights for one ordinary backward of ``(weights * torch.stack(losses)).sum()``.

        That backward gives the shared parameters the aligned gradient; heads get theirs times the task's weight.

        Args:
            losses: one scalar a task, in a sequence or a dict; None for an absent task: a zero gradient.
            shared: the shared parameters; or the features, for the upper-bound form: T passes through the heads alone.
                Under data parallelism what is an ``nn.Parameter`` counts as the same on all ranks (T gradients of it
                are averaged), anything else as features, of which every rank has its own.

        Returns:
            [T], in the losses' dtype and order, without gradient. The graph is kept; ``.grad`` and ``.jac`` are not
            touched. T copies of the gradient at ``shared`` are held on the way.
        """
        check_ordinary_autograd("AlignedMTL.weigh")
        _, values = named_losses("AlignedMTL.weigh", losses)
        if len(values) != self.num_tasks:
            raise ValueError(f"AlignedMTL.weigh: losses: expected {self.num_tasks}, found {len(values)}")
        order = self._order("AlignedMTL.weigh", tuple(losses)) if isinstance(losses, Mapping) else None
        values = values if order is None else [values[i] for i in order]
        listed = [shared] if isinstance(shared, Tensor) else list(shared)
        wanted = [tensor for tensor in dict.fromkeys(listed) if tensor.requires_grad]
        if not wanted:
            raise ValueError("AlignedMTL.weigh: shared: expected a tensor that requires a gradient, found none")
        if any(map(is_sharded, wanted)):
            raise ValueError(
                "AlignedMTL.weigh: shared: expected features, or parameters that are not sharded (fully_shard), found "
                "shards, whose gradients exist in whole backward passes alone; use task_backward and merge"
            )
        world = world_of(self._group)
        parameters = [isinstance(tensor, nn.Parameter) for tensor in wanted]
        if world.size > 1 and any(parameters) and not all(parameters):
            raise ValueError("AlignedMTL.weigh: shared: expected parameters, or features, found both")
        found = [
            [None] * len(wanted)
            if loss is None or not loss.requires_grad
            else torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for loss in values
        ]
        some = any(loss is not None and loss.requires_grad for loss in values)
        if some and all(gradient is None for row in found for gradient in row):
            raise ValueError(
                "AlignedMTL.weigh: shared: expected tensors that the losses were computed from, found none; where "
                "features and losses come out of one torch.compile, compile backbone and heads apart; give "
                "torch.utils.checkpoint use_reentrant=False"
            )
        rows = [
            [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in zip(wanted, row)]
            for row in found
        ]
        if world.size > 1 and all(parameters):
            # Clones: gradients may share memory, as those of a sum do.
            rows = [[gradient.clone() for gradient in row] for row in rows]
            world.average_([gradient for row in rows for gradient in row])
            world = ALONE
        self._use(wanted[0].device)
        self._align(ops.gram(rows, check_finite=self.check_finite and world.size == 1), world)
        dtypes = [loss.dtype for loss in values if loss is not None]
        found_weights = copies([self._result.weights])[0].to(dtypes[0] if dtypes else torch.get_default_dtype())
        return found_weights if order is None else found_weights[[order.index(t) for t in range(len(order))]]

    def _order(self, op: str, tasks: tuple[str, ...]) -> list[int] | None:
        """Return where the tasks of the first use are among these, which may come in another order now."""
        if self._tasks is None:
            object.__setattr__(self, "_tasks", tasks)
        return order_of(op, tasks, self._tasks or (), "this module's first use")


def _checked_preference(preference: Tensor | Sequence[float] | None, tasks: int) -> tuple[float, ...] | None:
    if preference is None:
        return None
    values = tuple(float(p) for p in (preference.tolist() if isinstance(preference, Tensor) else preference))
    if len(values) != tasks:
        raise ValueError(f"AlignedMTL: preference: expected {tasks} numbers, one a task, found {len(values)}")
    if not all(math.isfinite(p) and p >= 0.0 for p in values) or not any(values):
        raise ValueError(f"AlignedMTL: preference: expected finite numbers from 0, not all 0, found {list(values)}")
    return values


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, module: AlignedMTL, world: World) -> tuple[Tensor, ...]:
        ctx.module, ctx.world = module, world
        ctx.set_materialize_grads(False)
        if not torch.compiler.is_compiling():
            ctx.source, ctx.done = features.grad_fn, False
        ctx.like = features.shape, {"dtype": features.dtype, "device": features.device}
        return tuple(stand_ins(features, module.num_tasks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            return once_differentiable(_Views._merged)(ctx, *gradients)
        return _Views._merged(ctx, *gradients)

    @staticmethod
    def _merged(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        rows = [gradient for gradient in gradients if gradient is not None]
        if not torch.compiler.is_compiling() and goes_on(ctx.source):
            if ctx.done:
                raise RuntimeError(
                    "AlignedMTL: expected one backward through a call of the layer, found a second, to which the first "
                    "one's tasks are lost; add the losses and call backward() once, or use task_backward and merge"
                )
            ctx.done = True
            ctx.module._note_arrived(len(rows))
        if not rows and ctx.world.size == 1:
            return None, None, None
        if len(rows) < len(gradients):
            shape, options = ctx.like
            rows = [torch.zeros(shape, **options) if gradient is None else gradient for gradient in gradients]
        return ctx.module._merge(rows, ctx.world), None, None
