"""The layer: identity forward, the aggregated gradient backward."""

from __future__ import annotations

import io
import itertools
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import NotScripted, check_tensor
from ..graph import check_ordinary_autograd, goes_on
from ..ops import define_operator, hide_from_dynamo
from ..ops.checks import check_finite, refuse, shape_of
from ..posterior.posteriors import STRUCTURES, Posterior, posterior_from_state, share_covariances
from ..reference.moments import IGNORE
from ..traced import copies, stand_ins
from ..world.ranks import World, name_of, world_of
from .aggregation import Batch, aggregate, diagnose
from .full_data import STATISTICS, FullData, full_data_posteriors
from .global_batch import gather_batch
from .heads import Head, Outputs, stacked_weights
from .incoming import WAYS_OUT, Own, as_published, find_foreign, read

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


FORGOTTEN = 5000  # passes without a posterior after which it is said that none was made


class BayesAgg(NotScripted, nn.Module):
    """A layer between the backbone and the heads: identity forward, the paper's aggregated gradient backward.

    A Gaussian posterior over each head's weights induces a distribution over the task's gradient at the shared
    features; each dimension of the gradient is averaged over the tasks by inverse variance. Heads get their ordinary
    gradients. Until there is a full-data posterior (:meth:`refresh`) the layer is plain summation (warm-up), and so it
    is in evaluation mode, under ``no_grad``, and for features that need no gradient.

    What arrives at the layer is read: what each task's loss was multiplied by (:attr:`loss_weights`; the scale of
    ``GradScaler``, accumulation, a reversed or stopped gradient) multiplies the task's part of the aggregate, and what
    is not a registered task's (penalties, other heads) goes on into the backbone as it is. So does the part of a head
    whose loss or layer is not the registered one, with a warning.

    Example::

        backbone, age, kind = nn.Linear(8, 64), nn.Linear(64, 1), nn.Linear(64, 5)
        bayes = BayesAgg([Regression(age), Multiclass(kind)])
        for _ in range(2):
            for x, y, c in [(torch.randn(32, 8), torch.randn(32, 1), torch.randint(0, 5, (32,)))]:
                z = bayes(backbone(x), [y, c])
                (mse_loss(age(z), y) + cross_entropy(kind(z), c)).backward()
            bayes.refresh()  # once an epoch

    Args:
        heads: :class:`Regression`, :class:`Binary`, :class:`Multiclass`, in the order of the targets. Every output of a
            regression or binary head is a task, a multiclass head is one. Their losses are the batch means of
            (w.h - y)^2, binary cross entropy with logits, and cross entropy.
        moments: "exact" (closed form and quadrature) or "sampled" (the published estimator, for classification).
        covariance: of classification posteriors: "block" (one block a class), "full" (as published; its memory is the
            square of classes times features), "kron" or "diag"; they differ for multiclass, and "diag" for binary.
            Regression posteriors are exact and full.
        num_samples: of the weights, for ``moments="sampled"``.
        statistics: for the full-data posterior: "streaming" keeps the epoch's sums alone, memory independent of the
            data set's size, and expands each batch at the weights it met; "stored" keeps the epoch's features, as
            published, and expands at the weights of the moment of ``refresh()``; "moving" has sums decay and makes the
            posterior anew as it goes, without ``refresh()``, which tells it how many examples an epoch has.
        seed: of the weight samples.
        reduction: of the tasks' gradients: "sum", their weighted mean times the number of tasks that have a label, with
            equal variances the plain sum, in size too, as it is in the warm-up; or "mean", as published.
        half_life: of moving statistics, in batches.
        process_group: the ranks that train together, each with its part of the batch (``DistributedDataParallel``,
            ``fully_shard``); all, if not given. See below.

    Labels that are NaN (multiclass: -100) contribute nothing; an example without any has a zero gradient.

    With several ranks, posteriors are those of all ranks' examples, and each rank gets its rows of the gradient of all
    of them in one batch, times the number of ranks, since these average gradients, where the losses are such, too
    (:func:`mtlgrad.distributed.global_means`). From the first :meth:`refresh` on every rank must make the same calls of
    the layer in training, :meth:`aggregate` and :meth:`refresh`, which communicate; the backward does not, nor does the
    warm-up. A state is a rank's own, and one for all right after :meth:`refresh`.

    ``torch.compile`` traces through the layer and :meth:`total`, also with ``fullgraph=True``.

    Raises:
        RuntimeError: shapes, dtypes, devices, at forward; ranks that differ; a second backward through a call.
        ValueError: options; on the CPU also values.

    Source: arXiv 2402.04005, algorithm 1.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        moments: str = "exact",
        covariance: str = "block",
        num_samples: int = 1024,
        statistics: str = "streaming",
        seed: int = 0,
        *,
        reduction: str = "sum",
        half_life: float = 10.0,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        _check_choice("moments", moments, ("exact", "sampled"))
        _check_choice("covariance", covariance, STRUCTURES)
        _check_choice("statistics", statistics, STATISTICS)
        _check_choice("reduction", reduction, ("mean", "sum"))
        if not (isinstance(half_life, (int, float)) and half_life > 0):
            raise ValueError(f"BayesAgg: half_life: expected a number of batches above 0, found {half_life!r}")
        if not isinstance(num_samples, int) or num_samples < 2:
            raise ValueError(f"BayesAgg: num_samples: expected at least 2, found {num_samples!r}")
        if not isinstance(heads, Iterable):
            raise ValueError(f"BayesAgg: heads: expected a sequence of heads, found {type(heads).__name__}")
        self.heads = tuple(heads)  # a tuple, not modules: the heads' parameters stay the model's own
        if not self.heads:
            raise ValueError("BayesAgg: heads: expected at least one head, found none")
        for i, head in enumerate(self.heads):
            if not isinstance(head, Head):
                raise ValueError(
                    f"BayesAgg: heads[{i}]: expected Regression, Binary or Multiclass, found {type(head).__name__}"
                )
        widths = [head.width for head in self.heads]
        if len(set(widths)) > 1:
            raise ValueError(f"BayesAgg: heads: expected one width of the features for all, found {widths}")
        if not isinstance(seed, int):
            raise ValueError(f"BayesAgg: seed: expected an integer, found {seed!r}")
        self.width = widths[0]
        self.moments, self.covariance, self.num_samples, self.seed = moments, covariance, num_samples, seed
        self.statistics, self.reduction, self.half_life = statistics, reduction, float(half_life)
        self.num_tasks = sum(head.num_tasks for head in self.heads)
        self._full_data = [FullData(head, covariance, statistics, half_life) for head in self.heads]
        self._posteriors: list[Posterior] | None = None
        self._noise: list[Tensor | None] = [None] * len(self.heads)  # of each head, [O]; None: one
        self._working: list[Posterior] = []  # the posteriors as the batches use them: dtype and device
        self._deviations: list[Tensor | None] = []
        self._powers: list[Tensor] = []
        self._groups = torch.zeros(0, device="cpu")  # [T, K] float64, which rows of the heads' weights are a task's
        self._balance: float | None = None  # see _make_posteriors
        self._number = 0  # of passes; seeds the samples, names the batch in errors
        self._since = 0  # passes since the posterior was made
        self._look = True  # for such heads, in the next backward
        self._foreign: dict[int, str] = {}  # heads whose gradient is not that of their plain loss
        self._told: set[str] = set()  # what was warned of
        self._evaluations = 0  # how often training was left without a posterior
        self._unseen: dict[str, int] = {}  # calls that left no batch, by reason
        self._group = name_of("BayesAgg", process_group)
        self._agreed: World | None = None  # whose ranks are known to have the same posteriors
        # Which pass was the last one, for total(): a tensor, since traced code may read and write nothing else that
        # changes from step to step.
        self._latest = torch.zeros((), dtype=torch.int64, device="cpu")
        self._handle = known_as(self)
        self._last: Batch | None = None  # what task_weights and gradient_variance tell of
        self._loss_weights: Tensor | None = None
        self._diagnosis: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"heads={list(self.heads)}, moments={self.moments!r}, covariance={self.covariance!r}"

    # ---- forward and backward

    def forward(self, features: Tensor, targets: Sequence[Tensor | None] | None = None, count: bool = True) -> Tensor:
        """Pass the features through, and have their gradient aggregated on its way back.

        Args:
            features: [B, D], the backbone's output; or [B, L, D] or [B, D, H, W], whose positions are the examples.
            targets: one tensor per head: Regression and Binary [B, O] (or [B]) float, Multiclass [B] int64; for more
                dimensions of the features [B, L, O], [B, O, H, W] and [B, L], [B, H, W]. None for a head without any
                label here. Not looked at, and may be left out, where the layer is plain identity.
            count: whether the batch enters the statistics. False for a second pass of the same examples.

        Returns:
            The features themselves.

        Raises:
            RuntimeError: shapes, dtypes, devices; a call within activation checkpointing, a CUDA graph or torch.func.
            TypeError: the features are no tensor.
            ValueError: the targets are not one a head; on the CPU also values.
        """
        check_tensor("BayesAgg", "features", features)
        if not (self.training and torch.is_grad_enabled() and features.requires_grad):
            if not torch.compiler.is_compiling():
                self._note_unseen(features)
            return features
        check_ordinary_autograd("BayesAgg")
        rows, listed = self._rows(features), self._listed(features, targets)
        token = record_batch(rows, listed, self._latest, self._handle, count)
        out: Tensor = ReplaceGradient.apply(rows, token)
        if features.dim() == 2:
            return out
        if features.dim() == 4:
            return out.unflatten(0, (features.shape[0], *features.shape[2:])).movedim(-1, 1)
        return out.view(features.shape)

    def _note_unseen(self, features: Tensor) -> None:
        reason = "in evaluation mode" if not self.training else "under no_grad"
        if self.training and torch.is_grad_enabled():
            reason = "with features that need no gradient (a frozen backbone)"
        self._unseen[reason] = self._unseen.get(reason, 0) + 1

    def _rows(self, features: Tensor) -> Tensor:
        """Return the features, [B, D], of as many examples as there are positions."""
        if features.dim() not in (2, 3, 4) or features.shape[1 if features.dim() == 4 else -1] != self.width:
            expected = f"[B, {self.width}], [B, L, {self.width}] or [B, {self.width}, H, W]"
            refuse(f"BayesAgg: features: expected shape {expected}, found {shape_of(features)}")
        if features.dim() == 2:
            return features
        return (features.movedim(1, -1) if features.dim() == 4 else features).reshape(-1, self.width)

    def _listed(self, features: Tensor, targets: Sequence[Tensor | None] | None) -> list[Tensor]:
        """Return a tensor for each head, one row an example."""
        if targets is None or isinstance(targets, Tensor) or len(targets) != len(self.heads):
            found = "none" if targets is None else "one tensor" if isinstance(targets, Tensor) else str(len(targets))
            expected = f"a sequence of {len(self.heads)}, one per head"
            raise ValueError(f"BayesAgg: targets: expected {expected}, found {found}")
        dims = features.dim()
        positions = [*features.shape[:1], *features.shape[2:]] if dims == 4 else [*features.shape[:-1]]
        listed = []
        for i, (head, target) in enumerate(zip(self.heads, targets)):
            if target is None:
                if head.likelihood.is_joint:
                    target = features.new_full(positions, IGNORE, dtype=torch.int64)
                else:
                    target = features.new_full([*positions, head.outputs], torch.nan)
            elif dims > 2 and isinstance(target, Tensor):
                has_outputs = target.dim() == dims and not head.likelihood.is_joint
                target = target.movedim(1, -1) if has_outputs and dims == 4 else target
                if list(target.shape[:-1] if has_outputs else target.shape) != positions:
                    last = "" if head.likelihood.is_joint else f", or {head.outputs} numbers at each"
                    refuse(
                        f"BayesAgg: heads[{i}]: targets: expected shape {positions} like the features{last}, "
                        f"found {shape_of(targets[i])}"  # type: ignore[arg-type]
                    )
            listed.append(target)
        if dims == 2:
            return listed
        joint = [head.likelihood.is_joint or t.dim() == len(positions) for head, t in zip(self.heads, listed)]
        return [t.reshape(-1) if flat else t.reshape(-1, t.shape[-1]) for t, flat in zip(listed, joint)]

    @torch.no_grad()
    def _record_batch(self, features: Tensor, targets: list[Tensor], borrowed: bool, count: bool) -> Pass:
        """``borrowed``: the tensors' memory is the caller's own again after this."""
        self._check_place(features)
        checked = self._check(features, targets)
        self._number += 1
        if self.statistics == "moving" and self._is_due():
            self._make_posteriors()
        if self._posteriors is None and self._number == FORGOTTEN:
            self._tell(
                "BayesAgg: expected refresh() after each epoch, found none in 5,000 batches; until then the layer "
                "is the plain sum"
            )
        # Copies: the batch may be a view of something much larger, or a buffer that the next one overwrites.
        stored, known = self.statistics == "stored", self._posteriors is not None
        rows = features.clone() if stored or borrowed else features.detach()
        kept = [target.clone() for target in checked] if stored or borrowed else checked
        batch, outputs = None, None
        with torch.autocast(features.device.type, enabled=False):
            if known or not stored:
                outputs = self._outputs(rows, kept, known)
            if known:
                assert outputs is not None
                batch = self._for_all_ranks(self._batch(rows, kept, outputs), rows)
            for i, (full_data, target) in enumerate(zip(self._full_data, kept)):
                if count:
                    full_data.add(rows, target, outputs, i)
        self._since += 1
        return Pass(self._number, batch)

    def _is_due(self) -> bool:
        """Whether moving statistics are far enough from those that the posterior was made of."""
        return self._since >= (self.half_life if self._posteriors is None else max(1.0, self.half_life / 4))

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=3)

    def train(self, mode: bool = True) -> BayesAgg:
        """Set the mode, as in torch.nn.Module; warn of a second evaluation without a posterior.

        Args:
            mode: True to train.

        Returns:
            The layer.
        """
        if self.training and not mode and self._full_data[0].count and self._posteriors is None:
            self._evaluations += 1
            if self._evaluations == 2 and self.statistics != "moving":
                self._tell(
                    "BayesAgg: expected refresh() after each epoch, found none before the second evaluation; until "
                    "then the layer is the plain sum"
                )
        return super().train(mode)

    @staticmethod
    def _check_place(features: Tensor) -> None:
        """Refuse places where the batch would enter the statistics twice, or not at all."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "BayesAgg: expected to be called outside of activation checkpointing, found the call repeated in a "
                "backward; checkpoint the backbone, and call the layer on what it returns"
            )
        if features.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "BayesAgg: expected to be called outside of a CUDA graph, whose replays the statistics would not see, "
                "found one being captured; capture backbone and heads (torch.cuda.make_graphed_callables)"
            )

    def _check(self, features: Tensor, targets: list[Tensor]) -> list[Tensor]:
        pairs = enumerate(zip(self.heads, targets))
        checked = [head.check(f"BayesAgg: heads[{i}]", features, target) for i, (head, target) in pairs]
        if features.device.type == "cpu":
            check_finite("BayesAgg: heads[0]", features=features)
        return checked

    def total(self, losses: Iterable[Tensor] | Mapping[Any, Tensor]) -> Tensor:
        """Return the sum of the task losses, and tell the layer what it is multiplied by before ``backward()``.

        Not needed where the losses of the registered heads are all that arrives. Where more does, the scale is exact
        with it, and else taken from the gradient. Belongs to the last call of the layer.

        Args:
            losses: scalars, batch means.

        Returns:
            The sum, a scalar.

        Raises:
            ValueError: no losses, or such that are no scalar tensors.
        """
        if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
            raise ValueError(f"BayesAgg.total: losses: expected a sequence or a dict, found {type(losses).__name__}")
        values = list(losses.values()) if isinstance(losses, Mapping) else list(losses)
        if not values:
            raise ValueError("BayesAgg.total: losses: expected at least one, found none")
        for i, loss in enumerate(values):
            if not isinstance(loss, Tensor):
                raise ValueError(f"BayesAgg.total: losses: expected scalar tensors, found {type(loss).__name__} at {i}")
            if loss.numel() != 1:
                raise ValueError(
                    f"BayesAgg.total: losses: expected scalars (batch means), found shape {list(loss.shape)} at {i}"
                )
        total = torch.stack([loss.reshape(()) for loss in values]).sum()
        return RecordScale.apply(total, self._latest) if total.requires_grad else total

    @torch.no_grad()
    def _replacement(self, recorded: Pass, gradient: Tensor, is_used: bool) -> Tensor:
        """``is_used``: whether it goes on into the backbone."""
        batch = recorded.batch
        if batch is None:
            return gradient
        if recorded.done and is_used:
            raise RuntimeError(
                f"BayesAgg: batch {recorded.number}: expected one backward through a call of the layer, found a "
                "second; add the losses and call backward() once, or call the layer again, with count=False"
            )
        recorded.done = recorded.done or is_used
        with torch.autocast(gradient.device.type, enabled=False):
            own = Own(batch.outputs, self._groups)
            foreign = None
            if self._look or self._foreign:
                foreign = self._find_foreign(gradient, own, recorded, batch.share)
            incoming = read(gradient, own, recorded.scale, batch.share, foreign)
            scales = incoming.scales
            if recorded.scale is not None and not batch.summed:
                outputs = [head.num_tasks for head in self.heads for _ in range(head.num_tasks)]
                scales = as_published(scales, recorded.scale * batch.share, outputs)
            result = aggregate(batch, scales, self._foreign)
        self._refuse_nan(result, recorded.number, gradient)
        self._last, self._diagnosis, self._loss_weights = batch, None, incoming.scales
        if incoming.rest is not None:
            result.add_(incoming.rest)
        return result.to(gradient.dtype)

    def _find_foreign(self, gradient: Tensor, own: Own, recorded: Pass, share: float) -> Tensor | None:
        """Return the rows of the heads whose gradient is not that of their plain loss, [K] bool; None: there are none.
        Looks in the first batch after the posterior was made."""
        if self._look:
            self._look = False
            explained = bool(read(gradient, own, recorded.scale, share).explained)
            self._foreign = {} if explained else find_foreign(gradient, own, self.heads)
            for i, what in self._foreign.items():
                self._tell(
                    f"BayesAgg: heads[{i}] ({self.heads[i].likelihood}): expected the gradient of its plain loss, "
                    f"found that of {what}; it goes on as it is, not aggregated: {WAYS_OUT[what]}"
                )
        if not self._foreign:
            return None
        marked = [i in self._foreign for i, head in enumerate(self.heads) for _ in range(head.outputs)]
        return torch.tensor(marked, device=gradient.device)

    @staticmethod
    def _refuse_nan(result: Tensor, number: int, gradient: Tensor | None = None) -> None:
        """On the CPU, unless the gradient that arrived has them (a loss scale that overflowed). Reading a device's
        values would hold up its queue: there NaN goes on into the gradients."""
        if result.device.type == "cpu" and math.isnan(result.sum()) and bool(result.isnan().any()):
            if gradient is not None and not bool(gradient.isfinite().all()):
                return
            at = torch.nonzero(result.isnan())[0].tolist()
            raise ValueError(
                f"BayesAgg: batch {number}: expected finite moments of the gradients, found NaN at [example, "
                f"dimension] {at}; a head's weight or target is NaN, or a variance is out of the dtype's range"
            )

    # ---- the full-data posterior

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the full-data posterior, the prior of every batch's, from the batches since the last call; float64.

        Call it once per epoch, after the last step; on all ranks, also on those that had no batch. With moving
        statistics it need not be called; where it is, it tells how many examples an epoch has.

        Raises:
            RuntimeError: no batch since the last call; ranks whose heads have other weights.
            ValueError: a precision that no jitter factorises; a head's layer that is no longer x W' + b.
        """
        if self._unseen and not self._full_data[0].count and world_of(self._group).size == 1:
            calls = ", ".join(f"{count} {reason}" for reason, count in self._unseen.items())
            raise RuntimeError(
                "BayesAgg.refresh: expected at least one training batch since the last refresh, found none, but calls "
                f"of the layer: {calls}"
            )
        if self.statistics == "moving":
            for full_data in self._full_data:
                full_data.end_epoch()
        self._make_posteriors()
        if self.statistics != "moving":
            for full_data in self._full_data:
                full_data.end_epoch()
        self._unseen = {}

    def _make_posteriors(self) -> None:
        world = world_of(self._group)
        self._posteriors, self._noise, self._number = full_data_posteriors(self._full_data, self._number, world)
        self._working, self._agreed, self._since, self._look = [], world, 0, True
        for i, head in enumerate(self.heads):
            head.probe(f"BayesAgg: heads[{i}]")
        if self._balance is None:
            # Residuals are as large as the noise lets them be. So, of gradients that are divided by it, the sum has at
            # first the size of the plain losses' sum; a classifier's noise is one. From then on gradients grow as the
            # noise falls, as those of the losses' logarithms do.
            noise = self.noise
            assert noise is not None
            deviations = noise.nan_to_num(1.0).sqrt()
            self._balance = float(deviations.sum() / (1.0 / deviations).sum())

    @property
    def posteriors(self) -> list[Posterior] | None:
        """Return the full-data posterior of every head, float64; None before the first :meth:`refresh`."""
        return self._posteriors

    @property
    def noise(self) -> Tensor | None:
        """Return the variance of each regression task's targets about its posterior mean, which its gradient is divided
        by, [T] float64; NaN for the other tasks. None before the first :meth:`refresh`."""
        if self._posteriors is None:
            return None
        parts = []
        for head, posterior, noise in zip(self.heads, self._posteriors, self._noise):
            known = 1.0 if head.likelihood.is_exact else torch.nan
            like = posterior.mean.new_full((head.num_tasks,), known)
            parts.append(like if noise is None else noise.to(like))
        return torch.cat(parts)

    def _outputs(self, rows: Tensor, targets: list[Tensor], known: bool = True) -> Outputs:
        """``known``: whether there is a posterior. Without one regressions need no weights, which cost a gather under
        fully_shard."""
        wide = rows.new_empty(0, dtype=torch.float64)
        if known or not any(head.likelihood.is_exact for head in self.heads):
            return Outputs(self.heads, rows, targets, stacked_weights(self.heads, wide))
        zero = wide.new_zeros(1, self.width + 1)
        weights = [zero.expand(h.outputs, -1) if h.likelihood.is_exact else h.weight(wide) for h in self.heads]
        return Outputs(self.heads, rows, targets, torch.cat(weights))

    def _batch(self, rows: Tensor, targets: list[Tensor], outputs: Outputs) -> Batch:
        features = rows.to(_working_dtype(rows))
        ready = self._working
        if not ready or ready[0].anchor.dtype != features.dtype or ready[0].anchor.device != features.device:
            self._prepare(features)
        return Batch(
            features=features,
            targets=targets,
            heads=self.heads,
            outputs=outputs,
            posteriors=self._working,
            deviations=self._deviations,
            powers=self._powers,
            balance=self._balance or 1.0,
            num_samples=self.num_samples if self.moments == "sampled" else 0,
            seed=self.seed * 1_000_003 + self._number,
            name=f"BayesAgg: batch {self._number}",
            summed=self.reduction == "sum",
        )

    def _prepare(self, like: Tensor) -> None:
        """Make what batches of features like these use of the posteriors."""
        assert self._posteriors is not None
        self._working = [posterior.to(like) for posterior in self._posteriors]
        share_covariances(self._working)
        self._deviations = [None if noise is None else noise.sqrt().to(like) for noise in self._noise]
        self._powers = [head.power.to(like.device) for head in self.heads]
        blocks = [
            like.new_ones(1, head.outputs, dtype=torch.float64)
            if head.likelihood.is_joint
            else torch.eye(head.outputs, dtype=torch.float64, device=like.device)
            for head in self.heads
        ]
        self._groups = torch.block_diag(*blocks)

    def _for_all_ranks(self, batch: Batch, rows: Tensor) -> Batch:
        assert self._posteriors is not None
        world = world_of(self._group)
        batch = gather_batch(batch, rows, self._number, self._posteriors, self._agreed == world, world)
        self._agreed = world
        return batch

    # ---- what the layer tells

    @torch.no_grad()
    def aggregate(self, features: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Aggregate a batch's gradient, as the layer would for a loss that is not scaled. With several ranks all must
        call it, each with its part of the batch.

        Args:
            features, targets: as of the layer.

        Returns:
            [B, D], B the examples (positions).

        Raises:
            RuntimeError: there is no full-data posterior; shapes, dtypes, devices.
            ValueError: as the layer.
        """
        if self._posteriors is None:
            raise RuntimeError("BayesAgg.aggregate: expected a full-data posterior, found none; call refresh() first")
        rows = features.detach()
        rows, listed = self._rows(rows), self._listed(rows, targets)
        checked = self._check(rows, listed)
        with torch.autocast(rows.device.type, enabled=False):
            outputs = self._outputs(rows, checked)
            batch = self._for_all_ranks(self._batch(rows, checked, outputs), rows)
            result = aggregate(batch)
        self._refuse_nan(result, self._number)
        return result

    @property
    def task_weights(self) -> Tensor | None:
        """Return each task's share of the weights in the last aggregated batch, [T], averaged over this rank's
        examples and the dimensions; None before. Computed when it is read, at about the cost of two aggregations."""
        return None if self._last is None else self._diagnose()[0]

    @property
    def loss_weights(self) -> Tensor | None:
        """Return what each task's loss, as a mean over the batch, was multiplied by in the last aggregated batch, [T]
        float64, read off the gradient that arrived; None before. Zero for a head whose gradient is not its loss's."""
        return self._loss_weights

    @property
    def gradient_variance(self) -> Tensor | None:
        """Return the variance of each task's gradient in the last aggregated batch, [T, D], averaged over this rank's
        examples that have its label (NaN where none has); None before. Of a regression task's gradient over its noise.
        Computed with :attr:`task_weights`."""
        return None if self._last is None else self._diagnose()[1]

    def _diagnose(self) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        if self._diagnosis is None:
            self._diagnosis = diagnose(self._last)
        return self._diagnosis

    @torch.no_grad()
    def predict(self, features: Tensor) -> list[Tensor]:
        """Compute the heads' outputs; regression by the full-data posterior's mean once there is one, as published,
        else by the head.

        Args:
            features: [B, D].

        Returns:
            For each head [B, O] or [B, C].
        """
        outputs = []
        for i, head in enumerate(self.heads):
            if self._posteriors is not None and head.likelihood.is_exact:
                outputs.append(head.likelihood.augment(features) @ self._posteriors[i].mean.to(features).T)
            else:
                outputs.append(head.predict(features))
        return outputs

    # ---- state

    def get_extra_state(self) -> Tensor:
        """Save posteriors, the epoch's statistics so far and the pass number: a resumed run repeats an uninterrupted
        one bit for bit. The statistics are those of this rank's examples: within an epoch every rank needs its own
        state, after :meth:`refresh` they are the same, and any number of ranks may go on with one. A layer that has
        seen nothing has no state, and one may be loaded from a checkpoint without it.

        Returns:
            uint8, on the CPU; empty where there is no state.
        """
        if not self._has_state():
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        state = {
            "version": 3,
            "heads": self._signature(),
            "number": self._number,
            "since": self._since,
            "balance": self._balance,
            "posteriors": None if self._posteriors is None else [p.state() for p in self._posteriors],
            "noise": list(self._noise),
            "full_data": [full_data.state() for full_data in self._full_data],
        }
        file = io.BytesIO()
        torch.save(state, file)
        return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)

    def _has_state(self) -> bool:
        return self._posteriors is not None or bool(self._full_data[0].count)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Who made the model without memory is about to fill it, by its keys (transformers' from_pretrained).
        if self._has_state() or self.heads[0].layers[0].weight.is_meta:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        missing = others[2]
        if f"{prefix}_extra_state" in missing:
            missing.remove(f"{prefix}_extra_state")

    def _signature(self) -> list[str]:
        """Say what a saved state must agree on with the layer."""
        return [
            *(head.signature for head in self.heads),
            f"covariance {self.covariance}",
            f"statistics {self.statistics}" + (f" {self.half_life}" if self.statistics == "moving" else ""),
        ]

    def set_extra_state(self, saved: Tensor) -> None:
        """Go on from a state, on the heads' device.

        Args:
            saved: by :meth:`get_extra_state`.

        Raises:
            ValueError: a state of other heads or options, or of another version of this package.
        """
        if not saved.numel():
            return
        weight = self.heads[0].layers[0].weight
        file = io.BytesIO(bytes(saved.cpu().numpy()))
        state = torch.load(file, map_location=saved.device if weight.is_meta else weight.device, weights_only=True)
        if state.get("version") != 3:
            raise ValueError(f"BayesAgg.load_state_dict: expected version 3, found {state.get('version')}")
        if state["heads"] != self._signature():
            raise ValueError(
                f"BayesAgg.load_state_dict: expected a state of {', '.join(self._signature())}; found one of "
                f"{', '.join(state['heads'])}"
            )
        self._number, self._since, self._balance = state["number"], state["since"], state["balance"]
        posteriors = state["posteriors"]
        self._posteriors = None if posteriors is None else [posterior_from_state(p) for p in posteriors]
        self._noise = state["noise"]
        self._working, self._last, self._diagnosis, self._agreed, self._loss_weights = [], None, None, None, None
        self._look, self._foreign = True, {}
        for full_data, part in zip(self._full_data, state["full_data"]):
            full_data.load_state(part)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy passes of its own."""
        super().__setstate__(state)
        self._latest = torch.zeros_like(self._latest)
        self._handle = known_as(self)


def _working_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"BayesAgg: {name}: expected one of {', '.join(choices)}, found {value!r}")


# ---- a pass as autograd and torch.compile see it ---------------------------------------------------------------------
#
# Two autograd functions around three operators. What a pass needs in its backward is in a :class:`Pass`. Traced code
# cannot hold one, nor touch what changes from step to step; it hands on a *token* instead, a tensor with the pass's
# number, that the operators look up. The pass lives as long as its token does: the graph has both.

_LAYERS: weakref.WeakValueDictionary[int, BayesAgg] = weakref.WeakValueDictionary()
_PASSES: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()
_handles = itertools.count(1)
_tokens = itertools.count(1)


class Pass:
    """What its backward needs."""

    def __init__(self, number: int, batch: Batch | None):
        self.number = number
        self.batch = batch  # None: the gradient stays as it is (warm-up)
        self.done = False  # its backward ran
        self.scale: Tensor | None = None  # what BayesAgg.total's sum was multiplied by
        self.layer: BayesAgg | None = None


def known_as(layer: BayesAgg) -> int:
    """Give the layer a number, which traced code has in its place."""
    handle = next(_handles)
    _LAYERS[handle] = layer
    return handle


@hide_from_dynamo
def _record_batch(
    features: Tensor, targets: Sequence[Tensor], latest: Tensor, layer: int, count: bool, borrowed: bool = True
) -> Tensor:
    recorded = _LAYERS[layer]._record_batch(features, list(targets), borrowed, count)
    recorded.layer = _LAYERS[layer]
    number = next(_tokens)
    latest.fill_(number)
    token = latest.clone()
    token._mtlgrad_pass = recorded  # type: ignore[attr-defined]  # an attribute lives as long as the tensor, graphs or not
    _PASSES[number] = recorded
    return token


def _pass_of(token: Tensor) -> Pass | None:
    return _PASSES.get(int(token))


@hide_from_dynamo
def _replace(gradient: Tensor, token: Tensor, is_used: bool = True) -> Tensor:
    recorded = _pass_of(token)
    if recorded is None or recorded.layer is None:
        raise RuntimeError(
            "BayesAgg: expected the pass that this backward belongs to, found it gone: something copies what compiled "
            "code saves for the backward (torch.autograd.graph.saved_tensors_hooks); keep the layer out of it"
        )
    return recorded.layer._replacement(recorded, gradient, is_used)


@hide_from_dynamo
def _record_scale(gradient: Tensor, token: Tensor) -> Tensor:
    recorded = _pass_of(token)
    if recorded is not None:
        recorded.scale = gradient.detach()
    return gradient


# Operators: results must be new tensors, and what they keep must be theirs.
_record_batch_op = define_operator(
    "bayesagg_record_batch(Tensor features, Tensor[] targets, Tensor(a!) latest, int layer, bool count) -> Tensor",
    _record_batch,
    lambda features, targets, latest, layer, count: torch.empty_like(latest),
)
_replace_op = define_operator(
    "bayesagg_replace(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _replace(gradient, token).clone(memory_format=torch.contiguous_format),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)
_record_scale_op = define_operator(
    "bayesagg_record_scale(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _record_scale(gradient.clone(), token).clone(),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)


def record_batch(features: Tensor, targets: list[Tensor], latest: Tensor, layer: int, count: bool) -> Tensor:
    """Return the token of a new pass."""
    if torch.compiler.is_compiling():
        token: Tensor = _record_batch_op(
            features.detach(), [target.detach() for target in targets], latest, layer, count
        )
        return token
    return _record_batch(features, targets, latest, layer, count, borrowed=False)


class ReplaceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(features, token)  # autograd then refuses features that were changed in place since
        if not torch.compiler.is_compiling():
            ctx.recorded = _pass_of(token)  # hooks on saved tensors may give back a copy
        return stand_ins(features, 1)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        features, token = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _replace_op(gradient, token), None
        return _replace(gradient, token, goes_on(features.grad_fn)), None


class RecordScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, latest: Tensor) -> Tensor:
        total, token = copies([total, latest])  # together: what the forward does not need is made in the backward
        ctx.save_for_backward(token)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (token,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _record_scale_op(gradient, token), None
        return _record_scale(gradient, token), None
