"""The layer: identity forward, the aggregated gradient backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..graph import check_ordinary_autograd
from ..ops.checks import check_shape
from ..posterior.posteriors import STRUCTURES, Posterior, posterior_from_state
from ..world.ranks import World, name_of, world_of
from .aggregation import Batch, aggregate, diagnose
from .full_data import STATISTICS, FullData, full_data_posteriors
from .global_batch import gather_batch
from .heads import Head
from .passes import Pass, RecordScale, ReplaceGradient, known_as, record_batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BayesAgg(nn.Module):
    """A layer between the backbone and the heads: identity forward, the paper's aggregated gradient backward.

    A Gaussian posterior over each head's weights induces a distribution over the task's gradient at the shared
    features; each dimension of the gradient is averaged over the tasks by inverse variance. Heads get their ordinary
    gradients. Until :meth:`refresh` is first called the layer is plain summation (warm-up), and so it is in evaluation
    mode, under ``no_grad``, and for features that need no gradient.

    Example::

        bayes = BayesAgg([Regression(age_head), Multiclass(race_head)])
        for features, targets in ...:
            features = bayes(backbone(inputs), targets)
            bayes.total([mse(age_head(features), age), cross_entropy(race_head(features), race)]).backward()
        bayes.refresh()  # once per epoch

    Args:
        heads: :class:`Regression`, :class:`Binary`, :class:`Multiclass`, in the order of the targets. Every output of a
            regression or binary head is a task, a multiclass head is one. Their losses are the batch means of
            (w.h - y)^2, binary cross entropy with logits, and cross entropy.
        moments: "exact" (closed form and quadrature) or "sampled" (the published estimator, for classification).
        covariance: of classification posteriors: "full", "block", "kron" or "diag"; they differ for multiclass, and
            "diag" for binary. Regression posteriors are exact and full.
        num_samples: of the weights, for ``moments="sampled"``.
        statistics: for the full-data posterior: "stored" keeps the epoch's features, as published, and expands at the
            weights of the moment of ``refresh()``; "streaming" keeps sums alone, memory independent of the data set's
            size, and expands each batch at the weights it met.
        seed: of the weight samples.
        reduction: of the tasks' gradients: "mean", as published, or "sum", the mean times the number of tasks that have
            a label: with equal variances the plain sum, in size too, as it is in the warm-up.
        process_group: the ranks that train together, each with its part of the batch (``DistributedDataParallel``,
            ``fully_shard``); all, if not given. See below.

    The scale of the loss (``GradScaler``, division for gradient accumulation) reaches the aggregated gradient through
    :meth:`total`; without it a scale of one is assumed.

    Labels that are NaN (multiclass: -100) contribute nothing; an example without any has a zero gradient.

    With several ranks, posteriors are those of all ranks' examples, and each rank gets its rows of the gradient of all
    of them in one batch, times the number of ranks, since these average gradients. So the losses must be such, too
    (:func:`mtlgrad.distributed.global_means`). From the first :meth:`refresh` on every rank must make the same calls of
    the layer in training, :meth:`aggregate` and :meth:`refresh`, which communicate; the backward does not, nor does the
    warm-up. A state is a rank's own, and one for all right after :meth:`refresh`.

    ``torch.compile`` traces through the layer and :meth:`total`, also with ``fullgraph=True``.

    Raises:
        RuntimeError: shapes, dtypes, devices, at forward; ranks that differ. ValueError: options; on the CPU also
            values.

    Source: arXiv 2402.04005, algorithm 1.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        moments: str = "exact",
        covariance: str = "full",
        num_samples: int = 1024,
        statistics: str = "stored",
        seed: int = 0,
        *,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
    ):
        super().__init__()
        _check_choice("moments", moments, ("exact", "sampled"))
        _check_choice("covariance", covariance, STRUCTURES)
        _check_choice("statistics", statistics, STATISTICS)
        _check_choice("reduction", reduction, ("mean", "sum"))
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
        self.statistics, self.reduction = statistics, reduction
        self.num_tasks = sum(head.num_tasks for head in self.heads)
        self._full_data = [FullData(head, covariance, statistics) for head in self.heads]
        self._posteriors: list[Posterior] | None = None
        self._noise: list[Tensor | None] = [None] * len(self.heads)  # of each head, [O]; None: one
        self._working: list[Posterior] = []  # the posteriors as the batches use them: dtype and device
        self._powers: list[Tensor] = []
        self._number = 0  # of passes; seeds the samples, names the batch in errors
        self._group = name_of("BayesAgg", process_group)
        self._agreed: World | None = None  # whose ranks are known to have the same posteriors
        # Which pass was the last one, for total(): a tensor, since traced code may read and write nothing else that
        # changes from step to step.
        self._latest = torch.zeros((), dtype=torch.int64, device="cpu")
        self._handle = known_as(self)
        self._last: Batch | None = None  # what task_weights and gradient_variance tell of
        self._diagnosis: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"heads={list(self.heads)}, moments={self.moments!r}, covariance={self.covariance!r}"

    # ---- forward and backward

    def forward(self, features: Tensor, targets: Sequence[Tensor] | None = None) -> Tensor:
        """The features themselves, [B, D].

        Args:
            features: [B, D], the backbone's output.
            targets: one tensor per head: Regression and Binary [B, O] (or [B]) float, Multiclass [B] int64. Not looked
                at, and may be left out, where the layer is plain identity.
        """
        if not (self.training and torch.is_grad_enabled() and features.requires_grad):
            return features
        check_ordinary_autograd("BayesAgg")
        token = record_batch(features, self._listed(targets), self._latest, self._handle)
        return ReplaceGradient.apply(features, token)

    def _listed(self, targets: Sequence[Tensor] | None) -> list[Tensor]:
        if targets is None or isinstance(targets, Tensor) or len(targets) != len(self.heads):
            found = "none" if targets is None else "one tensor" if isinstance(targets, Tensor) else str(len(targets))
            expected = f"a sequence of {len(self.heads)}, one per head"
            raise ValueError(f"BayesAgg: targets: expected {expected}, found {found}")
        return list(targets)

    @torch.no_grad()
    def _record_batch(self, features: Tensor, targets: list[Tensor], borrowed: bool) -> Pass:
        """``borrowed``: the tensors' memory is the caller's own again after this."""
        self._check_place(features)
        checked = self._check(features, targets)
        self._number += 1
        # Copies: the batch may be a view of something much larger, or a buffer that the next one overwrites.
        stored = self.statistics == "stored"
        rows = features.clone() if stored or borrowed else features.detach()
        kept = [target.clone() for target in checked] if stored or borrowed else checked
        with torch.autocast(features.device.type, enabled=False):
            wide = features.new_empty(0, dtype=_working_dtype(features) if stored else torch.float64)
            known = self._posteriors is not None
            weights = [None if stored and not known else head.weight(wide) for head in self.heads]
            batch = self._for_all_ranks(self._batch(rows, kept, weights), rows) if known else None
            for full_data, target, weight in zip(self._full_data, kept, weights):
                full_data.add(rows, target, weight)
            return Pass(self._number, batch)

    @staticmethod
    def _check_place(features: Tensor) -> None:
        """The batch would enter the statistics twice, or not at all."""
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
        check_shape("BayesAgg", "features", features, ("B", self.width))
        pairs = enumerate(zip(self.heads, targets))
        return [head.check(f"BayesAgg: heads[{i}]", features, target) for i, (head, target) in pairs]

    def total(self, losses: Iterable[Tensor] | Mapping[Any, Tensor]) -> Tensor:
        """The sum of the task losses, through which the scale of the loss reaches this layer's backward.

        Belongs to the last call of the layer; whatever the sum is multiplied by before ``backward()`` multiplies the
        aggregated gradient.
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

    def _replacement(self, recorded: Pass, gradient: Tensor) -> Tensor:
        if recorded.batch is None:
            return gradient
        result = aggregate(recorded.batch)
        self._refuse_nan(result, recorded.number)
        self._last, self._diagnosis = recorded.batch, None
        if recorded.scale is not None:
            result = result * recorded.scale.to(result.dtype)
        return result.to(gradient.dtype)

    @staticmethod
    def _refuse_nan(result: Tensor, number: int) -> None:
        """On the CPU. Reading a device's values would hold up its queue: there NaN goes on into the gradients."""
        if result.device.type == "cpu" and bool(result.sum().isnan()) and bool(result.isnan().any()):
            at = torch.nonzero(result.isnan())[0].tolist()
            raise ValueError(
                f"BayesAgg: batch {number}: expected finite moments of the gradients, found NaN at [example, "
                f"dimension] {at}; a head's weight or target is NaN, or a variance is out of the dtype's range"
            )

    # ---- the full-data posterior

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the full-data posterior, the prior of every batch's, from the batches since the last call; float64.

        Call it once per epoch, after the last step; on all ranks, also on those that had no batch.
        """
        world = world_of(self._group)
        posteriors, self._number = full_data_posteriors(self._full_data, self._number, world)
        for i, posterior in enumerate(posteriors):
            posterior.name = f"BayesAgg.refresh: heads[{i}] ({posterior.likelihood})"
            posterior.covariance()  # where it cannot be had, say so now and not in the next batch
        self._noise = [full_data.noise(p, world) for full_data, p in zip(self._full_data, posteriors)]
        self._posteriors, self._working, self._agreed = posteriors, [], world
        for full_data in self._full_data:
            full_data.clear()

    @property
    def posteriors(self) -> list[Posterior] | None:
        """The full-data posterior of every head, float64; None before the first :meth:`refresh`."""
        return self._posteriors

    @property
    def noise(self) -> Tensor | None:
        """[T] float64: the variance of each regression task's targets about its posterior mean, which its gradient is
        divided by; NaN for the other tasks. None before the first :meth:`refresh`."""
        if self._posteriors is None:
            return None
        parts = []
        for head, posterior, noise in zip(self.heads, self._posteriors, self._noise):
            known = 1.0 if head.likelihood == "regression" else torch.nan
            like = posterior.mean.new_full((head.num_tasks,), known)
            parts.append(like if noise is None else noise.to(like))
        return torch.cat(parts)

    def _batch(self, rows: Tensor, targets: list[Tensor], weights: Sequence[Tensor | None]) -> Batch:
        assert self._posteriors is not None
        features = rows.to(_working_dtype(rows))
        ready = self._working
        if not ready or ready[0].anchor.dtype != features.dtype or ready[0].anchor.device != features.device:
            self._working = [
                (posterior if noise is None else posterior.in_units_of(noise.sqrt())).to(features)
                for posterior, noise in zip(self._posteriors, self._noise)
            ]
            self._powers = [head.power.to(features.device) for head in self.heads]
        return Batch(
            features=features,
            targets=[
                target if noise is None else target.to(features) / noise.sqrt().to(features)
                for target, noise in zip(targets, self._noise)
            ],
            heads=self.heads,
            weights=[None if weight is None else weight.to(features) for weight in weights],
            posteriors=self._working,
            powers=self._powers,
            num_samples=self.num_samples if self.moments == "sampled" else 0,
            seed=self.seed * 1_000_003 + self._number,
            name=f"BayesAgg: batch {self._number}",
            summed=self.reduction == "sum",
        )

    def _for_all_ranks(self, batch: Batch, rows: Tensor) -> Batch:
        assert self._posteriors is not None
        world = world_of(self._group)
        batch = gather_batch(batch, rows, self._number, self._posteriors, self._agreed == world, world)
        self._agreed = world
        return batch

    # ---- what the layer tells

    @torch.no_grad()
    def aggregate(self, features: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The gradient that the layer would send back for a batch whose loss is not scaled, [B, D]. With several ranks
        all must call it, each with its part of the batch."""
        if self._posteriors is None:
            raise RuntimeError("BayesAgg.aggregate: expected a full-data posterior, found none; call refresh() first")
        rows = features.detach()
        checked = self._check(rows, self._listed(targets))
        with torch.autocast(rows.device.type, enabled=False):
            weights = [head.weight(rows.new_empty(0, dtype=_working_dtype(rows))) for head in self.heads]
            batch = self._for_all_ranks(self._batch(rows, checked, weights), rows)
        result = aggregate(batch)
        self._refuse_nan(result, self._number)
        return result

    @property
    def task_weights(self) -> Tensor | None:
        """[T]: each task's share of the weights in the last aggregated batch, averaged over this rank's examples and
        the dimensions; None before. Computed when it is read, at about the cost of two aggregations."""
        return None if self._last is None else self._diagnose()[0]

    @property
    def gradient_variance(self) -> Tensor | None:
        """[T, D]: the variance of each task's gradient in the last aggregated batch, averaged over this rank's examples
        that have its label (NaN where none has); None before. Of a regression task's gradient over its noise. Computed
        with :attr:`task_weights`."""
        return None if self._last is None else self._diagnose()[1]

    def _diagnose(self) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        if self._diagnosis is None:
            self._diagnosis = diagnose(self._last)
        return self._diagnosis

    @torch.no_grad()
    def predict(self, features: Tensor) -> list[Tensor]:
        """The heads' outputs, [B, O] or [B, C] each; regression by the full-data posterior's mean once there is one, as
        published (no bias), else by the head."""
        outputs = []
        for i, head in enumerate(self.heads):
            if self._posteriors is not None and head.likelihood == "regression":
                outputs.append(features @ self._posteriors[i].mean.to(features).T)
            else:
                outputs.append(head.predict(features))
        return outputs

    # ---- state

    def get_extra_state(self) -> dict[str, Any]:
        """The posteriors, the epoch's statistics so far and the pass number: a resumed run repeats an uninterrupted one
        bit for bit. The statistics are those of this rank's examples: within an epoch every rank needs its own state,
        after :meth:`refresh` they are the same, and any number of ranks may go on with one."""
        return {
            "version": 1,
            "heads": self._signature(),
            "number": self._number,
            "posteriors": None if self._posteriors is None else [p.state() for p in self._posteriors],
            "noise": list(self._noise),
            "full_data": [full_data.state() for full_data in self._full_data],
        }

    def _signature(self) -> list[str]:
        """What a saved state must agree on with the layer."""
        return [
            *(head.signature for head in self.heads),
            f"covariance {self.covariance}",
            f"statistics {self.statistics}",
        ]

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != 1:
            raise ValueError(f"BayesAgg.load_state_dict: expected version 1, found {state.get('version')}")
        if state["heads"] != self._signature():
            raise ValueError(
                f"BayesAgg.load_state_dict: expected a state of {', '.join(self._signature())}; found one of "
                f"{', '.join(state['heads'])}"
            )
        self._number = state["number"]
        posteriors = state["posteriors"]
        self._posteriors = None if posteriors is None else [posterior_from_state(p) for p in posteriors]
        self._noise = state.get("noise") or [None] * len(self.heads)
        self._working, self._last, self._diagnosis, self._agreed = [], None, None, None
        for full_data, saved in zip(self._full_data, state["full_data"]):
            full_data.load_state(saved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's passes are its own."""
        super().__setstate__(state)
        self._latest = torch.zeros_like(self._latest)
        self._handle = known_as(self)


def _working_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"BayesAgg: {name}: expected one of {', '.join(choices)}, found {value!r}")
