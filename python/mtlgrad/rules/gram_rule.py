"""The three forms of every rule that weighs tasks by the Gram matrix of their gradients."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..arguments import Losses, NotScripted, check_tensor, named_losses, parameter_list
from ..graph import check_ordinary_autograd, goes_on, in_a_trace, leaves_of
from ..jacobian import order_of, reorder, rows_of
from ..ops.checks import check_gram
from ..traced import copies, stand_ins
from ..world.jacobians import check_averaged
from ..world.ranks import ALONE, World, name_of, world_of
from ..world.shards import by_groups, is_sharded, like_sharded, local, sum_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Constant:
    """A number of a rule, which ``torch.compile`` takes for a constant of the graph.

    Kept as text: of a float, Dynamo makes an input where sizes are dynamic, which a second layer's backward in the same
    region does not find.
    """

    def __set_name__(self, rule: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, rule: Any, owner: type) -> Any:
        text = rule.__dict__[self._name]
        return None if text is None else float(text)

    def __set__(self, rule: Any, number: float | None) -> None:
        rule.__dict__[self._name] = None if number is None else repr(float(number))


class GramRule(NotScripted, nn.Module):
    r"""Any rule that weighs tasks by the Gram matrix of their gradients, in three forms.

    - ``z = rule(features)``: a layer between backbone and heads, of the gradients at the shared representation. One
      ordinary ``loss.backward()``.
    - :meth:`merge`: ``.jac`` of parameters (:func:`mtlgrad.task_backward`, or TorchJD) to ``.grad``.
    - :meth:`weigh`: task weights first, then one backward of the weighted sum, by whatever trainer.

    With g_t the tasks' gradients, M_ij = <g_i, g_j> and w = ``weighting(M)``, the update is :math:`\sum_t w_t g_t`.

    Args:
        num_tasks: T.
        weighting: called with M, [T, T] float64, on the gradients' device and without gradient, returns w, [T]: yours,
            or any of TorchJD's weightings over a Gramian (their preference in float64, too). Of several ranks, the
            first one's answer counts on all.
        check_finite: raises ``ValueError`` naming the task whose gradient has NaN or infinity; this reads from the
            device.
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised. The
            weights are then those of the gradients of all ranks' examples, as one process would find them: the layer
            and ``weigh(losses, features)`` sum the ranks' Gram matrices, T x T numbers; ``merge`` needs nothing for
            ``.jac`` that :func:`mtlgrad.task_backward` left, which is the mean already.

    Attributes:
        weights: [T] float64, of the latest use, on the gradients' device, unread by the host: None before the first,
            NaN between the layer's first forward and its backward. (A forward without gradients is no use.)

    Raises:
        TypeError: ``weighting`` is no function of the Gram matrix, or ``process_group`` no process group.
        ValueError: ``num_tasks`` below 1; in use, ``weighting`` returns no tensor [T].
    """

    preference: tuple[float, ...] | None = None
    #: Whether merge must (or must not) be told the heads, None: it may. Such a rule's layer is refused.
    scale_heads: bool | None = None
    #: Whether the weights may depend on more than the Gram matrix, and so differ from rank to rank.
    _draws = False

    def __init__(
        self,
        num_tasks: int,
        weighting: Callable[[Tensor], Tensor] | None,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        self._op = type(self).__name__
        if num_tasks < 1:
            raise ValueError(f"{self._op}: num_tasks: expected at least 1, found {num_tasks}")
        self.num_tasks = num_tasks
        if type(self)._find is GramRule._find:
            _check_weighting(self._op, weighting)
            self.weighting: Any = weighting
            self._draws = True
            self._register()
        self.check_finite = check_finite
        self._group = name_of(self._op, process_group)
        # Not buffers, which .half() would round. Operators write in place, as torch.compile and CUDA graphs need.
        # Here, and not at the first use: what a traced forward creates, its backward could not write to.
        self._used = False
        self._told: set[str] = set()  # what was warned of
        self._alone = 0  # backwards of one task alone, in a row
        self._watched: tuple[int, int] | None = None  # in evaluation mode: which parameter, and its version
        self._tasks: tuple[str, ...] | None = None  # the names in the order of the first use that had some
        self._prepare(torch.get_default_device())

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"num_tasks={self.num_tasks}"

    @property
    def weights(self) -> Tensor | None:
        return self._latest(self._weights)

    def _latest(self, value: Tensor) -> Tensor | None:
        # A copy: the next step writes to the same memory.
        return copies([value])[0] if self._used else None

    def _find(self, gram: Tensor, out: Tensor) -> None:
        """Write the weights for the Gram matrix to ``out``: what a rule of its own replaces."""
        with torch.no_grad():
            if torch.compiler.is_compiling():
                out.copy_(_weighting_op(gram, self._number))
            else:
                out.copy_(self._answer(gram))

    def _register(self) -> None:
        self._number = next(_numbers)
        _rules[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_number" in state:  # a copy is another rule
            self._register()

    def _answer(self, gram: Tensor) -> Tensor:
        """Return what ``weighting`` says, float64."""
        weights = self.weighting(gram.detach().clone())
        if not isinstance(weights, Tensor) or weights.shape != (self.num_tasks,):
            found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"{self._op}: weighting: expected to return a tensor [{self.num_tasks}], found {found}")
        return weights.detach().to(gram)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Make T views of the features, one per head: view t goes to head t, and to nothing else.

        In the backward the T gradients that arrive meet here, and their weighed sum goes on into the backbone. A view
        that no loss uses has a zero gradient. All losses must come back in one backward: add them up. In evaluation
        mode, or without gradients, the views are all there is; ``weights`` are NaN after the former.

        Under data parallelism every rank must take part in the backward, even one whose losses are all zero.

        Args:
            features: [B, ...], any floating or complex dtype; of several ranks each its own part of the batch.

        Returns:
            T tensors like the features.

        Raises:
            RuntimeError: ``scale_heads=True``; within torch.func; in the backward, a second one through a call.
            TypeError: the features are no tensor, or of integers.
        """
        if self.scale_heads:
            raise RuntimeError(
                f"{self._op}: scale_heads: expected False in the layer, found True: heads have their gradients before "
                "the weights exist; use weigh(losses, features), or task_backward and merge(parameters, heads=...)"
            )
        check_tensor(self._op, "features", features)
        if not features.is_floating_point() and not features.is_complex():
            raise TypeError(f"{self._op}: features: expected a floating or complex dtype, found {features.dtype}")
        if not (self.training and torch.is_grad_enabled() and features.requires_grad):
            if torch.is_grad_enabled() and features.requires_grad and not in_a_trace():
                self._note_evaluation(features)
            return tuple(features.view_as(features) for _ in range(self.num_tasks))
        check_ordinary_autograd(self._op)
        self._use(features.device)
        object.__setattr__(self, "_watched", None)
        return _Views.apply(features, self, world_of(self._group))

    def _note_evaluation(self, features: Tensor) -> None:
        """Of a forward in evaluation mode with gradients: for a look at them, or in a training without the rule,
        between whose forwards parameters move."""
        self._weights.fill_(torch.nan)
        parameter = next((p for p in leaves_of([features], set()) if isinstance(p, nn.Parameter)), None)
        before, now = self._watched, None if parameter is None else (id(parameter), parameter._version)
        object.__setattr__(self, "_watched", now)
        if before is not None and now is not None and before[0] == now[0] and before[1] < now[1]:
            self._tell(
                f"{self._op}: expected to be trained in training mode, found parameters that moved between forwards in "
                "evaluation mode, where nothing is merged; call its train() (to freeze BatchNorm put those layers "
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
                f"{self._op}: expected the gradients of {self.num_tasks} tasks in a backward, found that of one alone, "
                f"{alone} times in a row: nothing is merged; call the layer once for all tasks' examples and add the "
                "losses up, or use task_backward and merge"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> GramRule:
        super()._apply(fn, recurse)
        device = fn(self._weights).device
        if device != self._weights.device:
            self._prepare(device)
        return self

    def _prepare(self, device: torch.device) -> None:
        """Memory on the device, once: a copy at each use would wait for the host, and could not be captured."""
        self._weights = torch.full((self.num_tasks,), torch.nan, dtype=torch.float64, device=device)
        self._preference: Tensor | None = None
        if self.preference is not None:
            self._preference = torch.tensor(self.preference, dtype=torch.float64, device=device)

    def _prefer(self, preference: Tensor | Sequence[float] | None) -> None:
        """Keep a preference: what a rule that has one does when it is made."""
        if preference is None:
            return
        values = tuple(float(p) for p in (preference.tolist() if isinstance(preference, Tensor) else preference))
        expected = f"{self._op}: preference: expected"
        if len(values) != self.num_tasks:
            raise ValueError(f"{expected} {self.num_tasks} numbers, one a task, found {len(values)}")
        if not all(math.isfinite(p) and p >= 0.0 for p in values) or not any(values):
            raise ValueError(f"{expected} finite numbers from 0, not all 0, found {list(values)}")
        self.preference = values
        self._prepare(self._weights.device)

    def _use(self, device: torch.device) -> None:
        if self._weights.device != device:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{self._op}: expected to be on {device} like its input before it is compiled, found "
                    f"{self._weights.device}; use its to(device)"
                )
            self._prepare(device)
        object.__setattr__(self, "_used", True)  # past the module's own, which looks for parameters

    def _merge(self, rows: list[Tensor] | ops.Stacked, world: World = ALONE) -> Any:
        """Return the weighed sum of the rows; of several ranks, which have other columns of G each, this rank's."""
        self._weigh(self._gram(rows, world))
        return ops.combine(rows, self._weights)

    def _gram(self, rows: Any, world: World) -> Tensor:
        """Return the Gram matrix; of several ranks, whose sum it is."""
        if world.size == 1:
            return ops.gram(rows, check_finite=self.check_finite)
        # Gradients are averaged over the ranks later on, so every rank's are W times its part of the batch's.
        return self._checked(world.sum_(ops.gram(rows)) / world.size**2)

    def _checked(self, gram: Tensor) -> Tensor:
        if self.check_finite:
            check_gram(self._op, gram)
        return gram

    def _weigh(self, gram: Tensor) -> None:
        """Find the weights, the same on all ranks."""
        self._find(gram, self._weights)
        if self._draws:
            self._share(world_of(self._group))

    def _share(self, world: World) -> None:
        """Give all ranks the first one's weights."""
        if world.size > 1:
            if not world.is_rank0:
                self._weights.zero_()
            world.sum_(self._weights)

    @torch.no_grad()
    def merge(
        self,
        parameters: Iterable[Tensor],
        retain_jac: bool = False,
        *,
        heads: Sequence[Iterable[Tensor]] | None = None,
    ) -> None:
        """Merge ``.jac`` to ``.grad``: the weighed sum is added to what ``.grad`` holds, and ``.jac`` is deleted.

        All the parameters count as one system. Those without ``.jac`` are left alone.

        Args:
            parameters: leaves with ``.jac`` [T, *shape], of :func:`mtlgrad.task_backward` or TorchJD (under data
                parallelism: after :func:`mtlgrad.distributed.average_jacobians`). Of parameters that ``fully_shard``
                shards every rank merges its own shards, with one all-reduce of T x T numbers.
            retain_jac: keeps ``.jac``.
            heads: for each task its head's parameters, if their ``.grad`` is to be multiplied by its weight, too.

        Raises:
            RuntimeError: ``.jac`` is not the mean over the ranks.
            ValueError: no ``.jac``, one of another shape or other tasks; heads that overlap, are not T, or are not
                given exactly if ``scale_heads`` says so.
        """
        if self.scale_heads not in (None, heads is not None):
            raise ValueError(
                f"{self._op}.merge: heads: expected the heads' parameters, one iterable a task, exactly if "
                f"scale_heads=True, found scale_heads={self.scale_heads} and {'none' if heads is None else 'some'}"
            )
        wanted = [p for p in parameter_list(f"{self._op}.merge", "parameters", parameters) if hasattr(p, "jac")]
        if not wanted:
            raise ValueError(
                f"{self._op}.merge: parameters: expected at least one with .jac, found none; call task_backward first"
            )
        for p in wanted:
            if p.jac.shape != (self.num_tasks, *p.shape):
                raise ValueError(
                    f"{self._op}.merge: parameters: expected .jac of shape {[self.num_tasks, *p.shape]}, "
                    f"found {list(p.jac.shape)}"
                )
        check_averaged(f"{self._op}.merge", [p.jac for p in wanted], self._group)
        every = {rows for p in wanted if (rows := rows_of(p.jac)) is not None}
        for rows in every:
            if rows.tasks is not None and (order := self._order(f"{self._op}.merge", rows.tasks)) is not None:
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
        for head, weight in zip(listed, self._weights):
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
        self._weigh(self._checked(gram))
        return ops.combine(ops.Stacked(rows), self._weights)

    def _listed(self, heads: Sequence[Iterable[Tensor]], shared: Sequence[Tensor]) -> list[list[Tensor]]:
        listed = [list(head) for head in heads]
        if len(listed) != self.num_tasks:
            raise ValueError(f"{self._op}.merge: heads: expected {self.num_tasks}, found {len(listed)}")
        every = [p for head in listed for p in head]
        if len(set(every)) < len(every):
            raise ValueError(f"{self._op}.merge: heads: expected every parameter in one head, found one in two")
        if set(every).intersection(shared):
            raise ValueError(f"{self._op}.merge: heads: expected parameters without .jac, found one of those to merge")
        return listed

    def weigh(self, losses: Losses, shared: Tensor | Iterable[Tensor]) -> Tensor:
        """Find the weights for one ordinary backward of ``(weights * torch.stack(losses)).sum()``.

        That backward gives the shared parameters the merged gradient; heads get theirs times the task's weight.

        Args:
            losses: one scalar a task, in a sequence or a dict; None for an absent task: a zero gradient.
            shared: the shared parameters; or the features, for the upper-bound form: T passes through the heads alone.
                Under data parallelism what is an ``nn.Parameter`` counts as the same on all ranks (T gradients of it
                are averaged), anything else as features, of which every rank has its own.

        Returns:
            [T], in the losses' dtype and order, without gradient. The graph is kept; ``.grad`` and ``.jac`` are not
            touched. T copies of the gradient at ``shared`` are held on the way.

        Raises:
            RuntimeError: within torch.func.
            TypeError: a loss is no tensor.
            ValueError: not T scalar losses, or of other tasks than before; no loss reaches ``shared``; shards (FSDP2).
        """
        check_ordinary_autograd(f"{self._op}.weigh")
        _, values = named_losses(f"{self._op}.weigh", losses)
        if len(values) != self.num_tasks:
            raise ValueError(f"{self._op}.weigh: losses: expected {self.num_tasks}, found {len(values)}")
        order = self._order(f"{self._op}.weigh", tuple(losses)) if isinstance(losses, Mapping) else None
        values = values if order is None else [values[i] for i in order]
        listed = [shared] if isinstance(shared, Tensor) else list(shared)
        wanted = [tensor for tensor in dict.fromkeys(listed) if tensor.requires_grad]
        if not wanted:
            raise ValueError(f"{self._op}.weigh: shared: expected a tensor that requires a gradient, found none")
        if any(map(is_sharded, wanted)):
            raise ValueError(
                f"{self._op}.weigh: shared: expected features, or parameters that are not sharded (fully_shard), found "
                "shards, whose gradients exist in whole backward passes alone; use task_backward and merge"
            )
        world = world_of(self._group)
        parameters = [isinstance(tensor, nn.Parameter) for tensor in wanted]
        if world.size > 1 and any(parameters) and not all(parameters):
            raise ValueError(f"{self._op}.weigh: shared: expected parameters, or features, found both")
        found = [
            [None] * len(wanted)
            if loss is None or not loss.requires_grad
            else torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for loss in values
        ]
        some = any(loss is not None and loss.requires_grad for loss in values)
        if some and all(gradient is None for row in found for gradient in row):
            raise ValueError(
                f"{self._op}.weigh: shared: expected tensors that the losses were computed from, found none; where "
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
        self._weigh(self._gram(rows, world))
        dtypes = [loss.dtype for loss in values if loss is not None]
        found_weights = copies([self._weights])[0].to(dtypes[0] if dtypes else torch.get_default_dtype())
        return found_weights if order is None else found_weights[[order.index(t) for t in range(len(order))]]

    def _order(self, op: str, tasks: tuple[str, ...]) -> list[int] | None:
        """Return where the tasks of the first use are among these, which may come in another order now."""
        if self._tasks is None:
            object.__setattr__(self, "_tasks", tasks)
        return order_of(op, tasks, self._tasks or (), "this module's first use")


#: TorchJD's that read nothing but the number of tasks.
_OF_NUMBERS_ALONE = {"MeanWeighting", "SumWeighting", "ConstantWeighting", "RandomWeighting"}


def _check_weighting(op: str, weighting: Any) -> None:
    if not callable(weighting):
        raise TypeError(
            f"{op}: weighting: expected a function of the Gram matrix [T, T] that returns weights [T], found "
            f"{type(weighting).__name__}"
        )
    # TorchJD's are modules of one interface, whether of a Gramian or of the gradients themselves.
    kinds = {base.__name__ for base in type(weighting).__mro__}
    if "_MatrixWeighting" in kinds and not kinds & _OF_NUMBERS_ALONE:
        raise TypeError(
            f"{op}: weighting: expected one over the Gram matrix, found TorchJD's {type(weighting).__name__}, which "
            "reads the gradients themselves"
        )


# A weighting is called behind an operator where torch.compile traces: it may be any code.
_numbers = itertools.count()
_rules: weakref.WeakValueDictionary[int, GramRule] = weakref.WeakValueDictionary()
_weighting_op = ops.define_operator(
    "weighting(Tensor gram, int rule) -> Tensor",
    lambda gram, rule: _rules[rule]._answer(gram),
    lambda gram, rule: torch.empty_like(gram[0]),
)


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, module: GramRule, world: World) -> tuple[Tensor, ...]:
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
                    f"{ctx.module._op}: expected one backward through a call of the layer, found a second, to which "
                    "the first one's tasks are lost; add the losses and call backward() once, or use task_backward and "
                    "merge"
                )
            ctx.done = True
            ctx.module._note_arrived(len(rows))
        if not rows and ctx.world.size == 1:
            return None, None, None
        if len(rows) < len(gradients):
            shape, options = ctx.like
            rows = [torch.zeros(shape, **options) if gradient is None else gradient for gradient in gradients]
        return ctx.module._merge(rows, ctx.world), None, None
