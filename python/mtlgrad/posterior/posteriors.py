"""Gaussian posteriors over the weights of last layers, for regression, binary and multiclass heads.

Regression is exact: unit noise, no bias. Classification is Laplace with the generalised Gauss-Newton matrix, expanded
at the weights that the caller gives (arXiv 2402.04005, section 4 and appendix; DESIGN 4.2)::

    precision = prior precision + sum_b J_b' Q_b J_b,   Q = diag(p) - p p'  (binary p (1 - p), regression 1)
    mean = w - precision^-1 (loss gradient + prior precision (w - prior mean))

The Jacobians are never formed: J_b' Q_b J_b = Q_b (x) h_b h_b'. Precisions are kept and added to; covariances come
from their Cholesky factors. A batch only adds sums, so :meth:`Posterior.update` may follow batch after batch, and the
mean is solved for when it is read.

B examples, D features, P = D + 1 (bias last), O outputs, C classes. float64 features are computed in float64, all
others in float32. Labels that are NaN (class: -100) are missing and contribute nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_same_device
from ..ops.moments import add_curvature
from ..world.ranks import World
from .cholesky import checked_cholesky
from .likelihoods import LIKELIHOODS, Bernoulli, Categorical, Gaussian, Likelihood, Terms

STRUCTURES = ("full", "block", "kron", "diag")
DEFAULT_GAMMA = 0.005  # prior variance, the published experiments' value


class Posterior(ABC):
    """N(mean, precision^-1) over [R, W] weights: R outputs or classes, W = D (regression) or P.

    Args:
        likelihood: :class:`mtlgrad.posterior.likelihoods.Likelihood`, with its ``name``.
        anchor: [R, W], a point near the mean; gives dtype and device.
        prior: of the same class and shape; None: N(0, gamma I).
        gamma: prior variance, where ``prior`` is None.

    Attributes:
        mean: [R, W].
        precision: regression [D, D], or [O, D, D] once labels were missing for some outputs only; binary [O, P, P];
            multiclass full [C*P, C*P] (class-major), block [C, P, P], kron the pair ([C, C], [P, P]); diag [R, W].
        structure: "full", "block", "kron" or "diag".

    Raises:
        ValueError: a precision that no jitter factorises, once mean, covariance or samples are asked for.
    """

    structure: str
    couples_classes = False  # whether the gradient has all of Q, not its diagonal alone
    exact: Posterior | None = None  # of a copy in less than float64: the original

    def __init__(self, likelihood: Likelihood, anchor: Tensor, prior: Posterior | None, gamma: float):
        self.likelihood = likelihood
        self.name = f"{likelihood} posterior"  # in errors and warnings
        self.gamma = gamma
        # The mean is anchor - precision^-1 residual: sums in deviations from a point nearby lose no digits.
        self.anchor = anchor
        self._start(prior)
        with torch.autocast(anchor.device.type, enabled=False):
            self.residual = self.times_precision(anchor if prior is None else anchor - prior.mean.to(anchor))

    # ---- what a structure provides

    @abstractmethod
    def _start(self, prior: Posterior | None) -> None:
        """Set the precision to the prior's, or to that of N(0, gamma I)."""

    @abstractmethod
    def _add(self, hidden: Tensor, terms: Terms, curvature: Tensor | None) -> None:
        """Add sum_b J_b' Q_b J_b; ``curvature``: that sum, where it is known."""

    @abstractmethod
    def times_precision(self, direction: Tensor) -> Tensor:
        """Multiply by the precision.

        Args:
            direction: [R, W].

        Returns:
            [R, W].
        """

    @abstractmethod
    def solve(self, direction: Tensor) -> Tensor:
        """Multiply by the inverse of the precision.

        Args:
            direction: [R, W].

        Returns:
            [R, W].
        """

    @property
    @abstractmethod
    def precision(self) -> Any: ...

    @abstractmethod
    def _covariance(self) -> Any: ...

    @abstractmethod
    def _sample(self, noise: Tensor) -> Tensor:
        """Deviations from the mean, [n, R, W], for standard normal noise of that shape."""

    # ---- what all share

    @staticmethod
    def sum_curvature(hidden: Tensor, terms: Terms) -> Tensor | None:
        """Sum what a batch adds to the precision.

        Args:
            hidden: [B, W].
            terms: of the batch.

        Returns:
            [1 or R, W, W] or [R*W, R*W]; None where it is not worth keeping.
        """
        return None

    def uses_lemma(self, batch: int) -> bool:
        """Tell whether so many examples are few enough to be conditioned on without summing a precision.

        Args:
            batch: the number of examples.

        Returns:
            Whether they are.
        """
        return False

    @cached_property
    def mean(self) -> Tensor:
        return self.anchor - self.solve(self.residual)

    @cached_property
    def _cached_covariance(self) -> Any:
        return self._covariance()

    def covariance(self) -> Any:
        """Return the inverse of ``precision``, of the same shape; computed once."""
        return self._cached_covariance

    @cached_property
    def contrasts(self) -> Any:
        """A covariance, of the same shape, whose differences between classes have the posterior's law; softmax and the
        gradient with respect to the features see nothing else. What moves all classes alike, of which the data say
        nothing, gets an ordinary variance: a weak prior's is so large that the differences drown in its rounding
        error. Only full and Kronecker covariances have such a direction."""
        return self.covariance()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights from the posterior.

        Args:
            n: how many.
            generator: torch's own if not given.

        Returns:
            [n, R, W].

        Raises:
            ValueError: ``n`` is no integer from 1.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"sample: n: expected an integer of at least 1, found {n!r}")
        shape = (n, *self.anchor.shape)
        noise = torch.randn(shape, generator=generator, dtype=self.anchor.dtype, device=self.anchor.device)
        return self.mean + self._sample(noise)

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor, weight: Tensor | None = None) -> Posterior:
        """Take in another batch, in place; the result is that of all batches at once.

        Args:
            features: [B, D], computed in the posterior's dtype.
            targets: as for the function that made this posterior.
            weight: where to expand, classification only; None: where the first batch was. Batches may be expanded at
                different weights (they are while a network trains): each contributes its own quadratic.

        Returns:
            The same posterior.

        Raises:
            RuntimeError, ValueError: as the function that made it; ``ValueError`` for a ``weight`` of a regression.
        """
        if weight is not None and self.likelihood.is_exact:
            raise ValueError("update: weight: expected none, a regression posterior is exact anywhere, found one")
        targets = self.likelihood.check("update", features, targets, self.anchor.shape, weight)
        check_same_device("update", "posterior", posterior=self.anchor, features=features)
        return self.add(features, targets, weight)

    def add(self, features: Tensor, targets: Tensor, weight: Tensor | None = None) -> Posterior:
        """Take in a batch that was checked.

        Args:
            features, targets, weight: as in :meth:`update`.

        Returns:
            The same posterior.
        """
        with torch.autocast(features.device.type, enabled=False):
            hidden = self.likelihood.augment(features.to(self.anchor))
            at = self.anchor if weight is None else weight.detach().to(self.anchor)
            return self.add_terms(hidden, self.likelihood.terms(hidden @ at.T, targets), at)

    def add_terms(self, hidden: Tensor, terms: Terms, at: Tensor, curvature: Tensor | None = None) -> Posterior:
        """Take in a batch whose terms are known.

        Args:
            hidden: [B, W].
            terms: at the weights ``at``.
            at: [R, W].
            curvature: the batch's :meth:`sum_curvature`, if that is known, too.

        Returns:
            The same posterior.
        """
        self._add(hidden, terms, curvature)
        self._add_gradient(hidden, terms, at)
        self._forget()
        return self

    def _add_gradient(self, hidden: Tensor, terms: Terms, at: Tensor) -> None:
        """Add the gradient at the anchor of the batch's quadratic, which was expanded at ``at``."""
        innovation = terms.innovation(hidden @ self.anchor.T, self.couples_classes)
        self.residual = torch.addmm(self.residual, innovation.T, hidden, alpha=-1.0)

    def _forget(self) -> None:
        for name in ("mean", "_cached_covariance", "contrasts", "factor"):
            self.__dict__.pop(name, None)

    # ---- of the data alone: what each rank, or each batch, has of them is a sum, and sums add up

    def scale(self, factor: float) -> None:
        """Count what was added so far so many times.

        Args:
            factor: how many; 0 of an empty posterior leaves no prior either.
        """
        self.residual = self.residual * factor
        for value in self._sums().values():
            value.mul_(factor)
        self._forget()

    def add_prior(self) -> None:
        """Add the prior N(0, gamma I) to sums of data alone."""
        start = type(self)(self.likelihood, self.anchor, None, self.gamma)
        self.residual = self.residual + start.residual
        for name, value in start._sums().items():
            self._sums()[name].add_(value)
        self._forget()

    def move(self, anchor: Tensor) -> None:
        """Count deviations of data alone from another point. Of a Kronecker posterior the mean changes a little.

        Args:
            anchor: that point, [R, W].
        """
        self.residual = self.residual + self._data_times(anchor - self.anchor)
        self.anchor = anchor

    def _data_times(self, direction: Tensor) -> Tensor:
        return self.times_precision(direction)

    # ---- copies

    def to(self, like: Tensor) -> Posterior:
        """Copy to another dtype or device, with mean and covariance computed before the cast: a covariance made in
        float64 is worth keeping in float32, a float32 Cholesky of it would not be as good.

        Args:
            like: a tensor of that dtype and device.

        Returns:
            The copy.
        """
        copy = posterior_from_state(self.state(), like)
        covariance, contrasts = (
            tuple(factor.to(like) for factor in matrix) if isinstance(matrix, tuple) else matrix.to(like)
            for matrix in (self.covariance(), self.contrasts)
        )
        copy.__dict__.update(mean=self.mean.to(like), _cached_covariance=covariance, contrasts=contrasts)
        if like.dtype != torch.float64 and self.anchor.dtype == torch.float64:
            copy.exact = self
        return copy

    def state(self) -> dict[str, Any]:
        """Return what :func:`posterior_from_state` makes an equal posterior of; later batches do not change it."""
        return {
            "likelihood": self.likelihood.name,
            "bias": self.likelihood.bias,
            "structure": self.structure,
            "gamma": self.gamma,
            "anchor": self.anchor,
            "residual": self.residual,
            "sums": {name: value.clone() for name, value in self._sums().items()},
        }

    @abstractmethod
    def _sums(self) -> dict[str, Tensor]: ...

    def _load_sums(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            setattr(self, name, value.to(self.anchor, copy=True))


class BlockPosterior(Posterior):
    """Independent rows, each with a precision matrix of its own, or all with the same one (regression)."""

    structure = "full"

    @staticmethod
    def sum_curvature(hidden: Tensor, terms: Terms) -> Tensor:
        q, width = terms.curvature, hidden.shape[1]
        sums = hidden.new_zeros(1 if q is None else q.shape[1], width, width)
        add_curvature(sums, hidden, None if q is None else q.T)
        return sums

    def uses_lemma(self, batch: int) -> bool:
        return batch < self.anchor.shape[1]

    def _start(self, prior: Posterior | None) -> None:
        rows, width = self.anchor.shape
        if prior is not None:
            self.blocks = prior.blocks.to(self.anchor).clone()  # type: ignore[attr-defined]
            return
        shared = 1 if self.likelihood.is_exact else rows
        self.blocks = (
            torch.eye(width, dtype=self.anchor.dtype, device=self.anchor.device).div(self.gamma).repeat(shared, 1, 1)
        )

    def _add(self, hidden: Tensor, terms: Terms, curvature: Tensor | None) -> None:
        count = 1 if terms.curvature is None else terms.curvature.shape[1]
        if count > self.blocks.shape[0]:  # labels missing for some outputs: they part ways
            self.blocks = self.blocks.repeat(count, 1, 1)
        if curvature is not None:
            self.blocks.add_(curvature)
        else:
            add_curvature(self.blocks, hidden, None if terms.curvature is None else terms.curvature.T)

    def times_precision(self, direction: Tensor) -> Tensor:
        return torch.einsum("ovw,ow->ov", self.blocks.expand(direction.shape[0], -1, -1), direction)

    @cached_property
    def factor(self) -> Tensor:
        return checked_cholesky(self.blocks, self.name)

    def solve(self, direction: Tensor) -> Tensor:
        if self.blocks.shape[0] == 1:
            return torch.cholesky_solve(direction.T, self.factor[0]).T
        return torch.cholesky_solve(direction[..., None], self.factor)[..., 0]

    @property
    def precision(self) -> Tensor:
        return self._public(self.blocks)

    def _covariance(self) -> Tensor:
        return self._public(torch.cholesky_inverse(self.factor))

    def _public(self, blocks: Tensor) -> Tensor:
        return blocks[0] if self.likelihood.is_exact and blocks.shape[0] == 1 else blocks

    def _sample(self, noise: Tensor) -> Tensor:
        # precision = L L': L^-T noise has the inverse as covariance
        columns = noise.permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.factor.mT, columns, upper=True).permute(2, 0, 1)

    def _sums(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks}


class ClassBlockPosterior(BlockPosterior):
    """Multiclass without the covariances between classes: one block per class."""

    structure = "block"


class DiagonalPosterior(Posterior):
    """Independent weights."""

    structure = "diag"

    def _start(self, prior: Posterior | None) -> None:
        if prior is not None:
            self.diagonal = prior.diagonal.to(self.anchor).clone()  # type: ignore[attr-defined]
        else:
            self.diagonal = torch.full_like(self.anchor, 1.0 / self.gamma)

    def _add(self, hidden: Tensor, terms: Terms, curvature: Tensor | None) -> None:
        self.diagonal = self.diagonal + terms.diagonal(hidden)

    def _add_gradient(self, hidden: Tensor, terms: Terms, at: Tensor) -> None:
        assert terms.residual is not None
        self.residual = self.residual + terms.residual.T @ hidden + terms.diagonal(hidden) * (self.anchor - at)

    def times_precision(self, direction: Tensor) -> Tensor:
        return self.diagonal * direction

    def solve(self, direction: Tensor) -> Tensor:
        return direction / self.diagonal

    @property
    def precision(self) -> Tensor:
        return self.diagonal

    def _covariance(self) -> Tensor:
        return 1.0 / self.diagonal

    def _sample(self, noise: Tensor) -> Tensor:
        return noise / self.diagonal.sqrt()

    def _sums(self) -> dict[str, Tensor]:
        return {"diagonal": self.diagonal}


class JointPosterior(Posterior):
    """Multiclass with all covariances: one [C*P, C*P] precision, class-major."""

    structure = "full"
    couples_classes = True

    def _start(self, prior: Posterior | None) -> None:
        if prior is not None:
            self.joint = prior.joint.to(self.anchor).clone()  # type: ignore[attr-defined]
        else:
            self.joint = torch.eye(self.anchor.numel(), dtype=self.anchor.dtype, device=self.anchor.device) / self.gamma

    @staticmethod
    def sum_curvature(hidden: Tensor, terms: Terms) -> Tensor:
        p, width = terms.probability, hidden.shape[1]
        assert p is not None
        classes = p.shape[1]
        joint = hidden.new_zeros(classes * width, classes * width)
        _add_joint(joint, hidden, p)
        return joint

    def uses_lemma(self, batch: int) -> bool:
        classes, width = self.anchor.shape
        return batch * (classes - 1) < classes * width

    def _add(self, hidden: Tensor, terms: Terms, curvature: Tensor | None) -> None:
        if curvature is not None:
            self.joint.add_(curvature)
        else:
            assert terms.probability is not None
            _add_joint(self.joint, hidden, terms.probability)

    def times_precision(self, direction: Tensor) -> Tensor:
        return (self.joint @ direction.flatten()).view_as(direction)

    @cached_property
    def factor(self) -> Tensor:
        return checked_cholesky(self.joint, self.name)

    def solve(self, direction: Tensor) -> Tensor:
        return torch.cholesky_solve(direction.flatten()[:, None], self.factor).view_as(direction)

    @property
    def precision(self) -> Tensor:
        return self.joint

    def _covariance(self) -> Tensor:
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def contrasts(self) -> Tensor:
        return contrasts_of(self.joint.clone(), len(self.anchor), self.name)

    def _sample(self, noise: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor.mT, noise.flatten(1).T, upper=True).T.view_as(noise)

    def _sums(self) -> dict[str, Tensor]:
        return {"joint": self.joint}


def _add_joint(joint: Tensor, hidden: Tensor, probability: Tensor) -> None:
    """Add sum_b Q_b (x) h~ h~', a class's row of blocks at a time; [C*P, C*P], class-major."""
    (_, classes), width = probability.shape, hidden.shape[1]
    blocks = joint.view(classes, width, classes, width)
    for c in range(classes):
        # Q_ck = [c = k] p_c - p_c p_k, k <= c: the upper triangle is the lower one's mirror image.
        weight = probability[:, c, None] * -probability[:, : c + 1]
        weight[:, c] += probability[:, c]
        sums = hidden.new_zeros(c + 1, width, width)
        add_curvature(sums, hidden, weight.T)
        blocks[c, :, : c + 1] += sums.transpose(0, 1)
        blocks[:c, :, c] += sums[:c]


def contrasts_of(joint: Tensor, classes: int, name: str) -> Tensor:
    """Return :attr:`Posterior.contrasts` of a precision [C*P, C*P], which is changed."""
    scale = joint.diagonal().view(classes, -1).mean(0)
    ties = joint.view(classes, len(scale), classes, len(scale)).diagonal(dim1=1, dim2=3)  # [C, C, P]
    ties.add_(scale.clamp(min=scale.mean()) / classes)
    return torch.cholesky_inverse(checked_cholesky(joint, name))


class KroneckerPosterior(Posterior):
    """Multiclass with precision A (x) G: A from the mean of Q over the examples, G from the sum of h~ h~'.

    The prior's 1/gamma I is shared out between the factors, A + a I and G + b I with a b = 1/gamma and a : b as the
    factors' mean diagonals (Martens and Grosse, arXiv 1503.05671, section 6.3), so the product is not the exact sum.
    The mean of batches expanded at different weights depends a little on which came first, for the same reason.
    """

    structure = "kron"
    couples_classes = True  # exact, not of the factors: a sum over the examples, whichever batches they come in

    def _start(self, prior: Posterior | None) -> None:
        if prior is not None:
            for name, value in prior._sums().items():
                setattr(self, name, value.to(self.anchor).clone())
            return
        classes, width = self.anchor.shape
        self.curvature = self.anchor.new_zeros(classes, classes)  # sum of Q
        self.gram = self.anchor.new_zeros(width, width)  # sum of h~ h~'
        self.count = self.anchor.new_zeros(())

    def _add(self, hidden: Tensor, terms: Terms, curvature: Tensor | None) -> None:
        p, labelled = terms.probability, terms.labels
        assert p is not None
        self.curvature = self.curvature + torch.diag(p.sum(0)) - p.T @ p
        if isinstance(labelled, Tensor):
            self.gram = self.gram + (hidden * labelled[:, None]).T @ hidden
            self.count = self.count + labelled.sum()
        else:
            self.gram = self.gram + hidden.T @ hidden
            self.count = self.count + len(hidden)

    def _data_times(self, direction: Tensor) -> Tensor:
        return self.curvature @ direction @ self.gram / self.count.clamp(min=1)

    @property
    def precision(self) -> tuple[Tensor, Tensor]:
        classes, width = self.anchor.shape
        mean_curvature = self.curvature / self.count.clamp(min=1)
        ratio = (mean_curvature.trace() / classes) / (self.gram.trace() / width)
        ratio = ratio.clamp(min=torch.finfo(ratio.dtype).eps ** 2)  # saturated logits have no curvature at all
        share = torch.where(self.count > 0, ratio, torch.ones_like(ratio)).sqrt() / math.sqrt(self.gamma)
        other = 1.0 / (self.gamma * share)
        eye = torch.eye
        return (
            mean_curvature + share * eye(classes, out=torch.empty_like(mean_curvature)),
            self.gram + other * eye(width, out=torch.empty_like(self.gram)),
        )

    def times_precision(self, direction: Tensor) -> Tensor:
        classes, features = self.precision
        return classes @ direction @ features

    @cached_property
    def factor(self) -> tuple[Tensor, Tensor]:
        classes, features = self.precision
        return (
            checked_cholesky(classes, f"{self.name}, class factor"),
            checked_cholesky(features, f"{self.name}, feature factor"),
        )

    def solve(self, direction: Tensor) -> Tensor:
        classes, features = self.factor
        return torch.cholesky_solve(torch.cholesky_solve(direction, classes).T, features).T

    def _covariance(self) -> tuple[Tensor, Tensor]:
        classes, features = self.factor
        return torch.cholesky_inverse(classes), torch.cholesky_inverse(features)

    @cached_property
    def contrasts(self) -> tuple[Tensor, Tensor]:
        classes, _ = self.precision
        tied = classes + classes.diagonal().mean() / len(classes)
        return torch.cholesky_inverse(checked_cholesky(tied, f"{self.name}, class factor")), self.covariance()[1]

    def _sample(self, noise: Tensor) -> Tensor:
        classes, features = self.factor
        left = torch.linalg.solve_triangular(classes.T, noise, upper=True)
        return torch.linalg.solve_triangular(features.T, left.mT, upper=True).mT

    def _sums(self) -> dict[str, Tensor]:
        return {"curvature": self.curvature, "gram": self.gram, "count": self.count}


def share_covariances(posteriors: Sequence[Posterior]) -> None:
    """Have regressions of equal precision hold one covariance, so that one batch conditions them together. For copies
    that stay as they are."""
    regressions = [p for p in posteriors if isinstance(p, BlockPosterior) and p.likelihood.is_exact]
    for i, posterior in enumerate(regressions):
        for other in regressions[:i]:
            if torch.equal(other.blocks, posterior.blocks):
                posterior.__dict__["_cached_covariance"] = other.covariance()
                break


def sum_over_ranks(posteriors: Sequence[Posterior], world: World) -> None:
    """Sum each over the ranks, in place. The anchors must agree, and the prior be on one rank alone.

    Bytes: those of the residuals [R, W] and of the precisions, in one all-reduce; and 8 a rank for each regression of
    several outputs, to ask whether these share one precision on all ranks.
    """
    if not posteriors:
        return
    _part_alike(posteriors, world)
    pieces = [tensor for p in posteriors for tensor in (p.residual, *p._sums().values())]
    flat = world.sum_(torch.cat([piece.reshape(-1) for piece in pieces]))
    parts = iter(flat.split([piece.numel() for piece in pieces]))
    for posterior in posteriors:
        posterior.residual = next(parts).view_as(posterior.residual).clone()
        for value in posterior._sums().values():
            value.copy_(next(parts).view_as(value))
        posterior._forget()


def _part_alike(posteriors: Sequence[Posterior], world: World) -> None:
    """Give outputs precisions of their own where labels are missing for some only, on any rank."""
    several = [p for p in posteriors if p.likelihood.is_exact and isinstance(p, BlockPosterior) and len(p.anchor) > 1]
    if not several:
        return
    found = world.gather_numbers([len(p.blocks) for p in several], several[0].anchor.device)
    for posterior, count in zip(several, (max(counts) for counts in zip(*found))):
        if len(posterior.blocks) < count:
            posterior.blocks = posterior.blocks.repeat(count, 1, 1)


def _class_for(likelihood: Likelihood, structure: str) -> type[Posterior]:
    if structure not in STRUCTURES:
        raise ValueError(f"structure: expected one of {', '.join(STRUCTURES)}, found {structure!r}")
    if likelihood.is_exact:
        return BlockPosterior  # shared by the outputs: less structure would save little and cost the mean
    if structure == "diag":
        return DiagonalPosterior
    if not likelihood.is_joint:
        return BlockPosterior  # nothing couples one-output tasks: block and kron are full
    return {"full": JointPosterior, "block": ClassBlockPosterior, "kron": KroneckerPosterior}[structure]


def check_gamma(gamma: float) -> None:
    if not (isinstance(gamma, (int, float)) and 0 < gamma < math.inf):
        raise ValueError(f"gamma: expected a finite prior variance above 0, found {gamma!r}")


def empty_posterior(
    likelihood: Likelihood, anchor: Tensor, prior: Posterior | None, gamma: float, structure: str
) -> Posterior:
    """Make the posterior of no data, the prior, to be updated."""
    check_gamma(gamma)
    kind = _class_for(likelihood, structure)
    if prior is not None:
        if type(prior) is not kind or prior.likelihood != likelihood:
            found = type(prior).__name__
            if isinstance(prior, Posterior):
                found = f"a {prior.likelihood} one of structure {prior.structure!r}"
            raise ValueError(f"prior: expected a {likelihood} posterior of structure {kind.structure!r}, found {found}")
        if prior.anchor.shape != anchor.shape:
            raise ValueError(f"prior: expected weights of shape {list(anchor.shape)}, found {list(prior.anchor.shape)}")
        gamma = prior.gamma
    return kind(likelihood, anchor, prior, gamma)


def posterior_from_state(state: dict[str, Any], like: Tensor | None = None) -> Posterior:
    """Make a posterior from :meth:`Posterior.state`, in the dtype and on the device of ``like`` where it is given."""
    likelihood = LIKELIHOODS[state["likelihood"]](state["bias"])
    kind = _class_for(likelihood, state["structure"])
    anchor = state["anchor"] if like is None else state["anchor"].to(like)
    posterior = kind(likelihood, anchor, None, state["gamma"])
    posterior.residual = state["residual"].to(anchor)
    posterior._load_sums(state["sums"])
    return posterior


@torch.no_grad()
def regression_posterior(
    features: Tensor,
    targets: Tensor,
    *,
    prior: Posterior | None = None,
    gamma: float = DEFAULT_GAMMA,
) -> Posterior:
    """Make the posterior over [O, D] weights, no bias, for targets of unit noise: precision = prior precision + H'H.

    Args:
        features: [B, D].
        targets: [B, O] or [B]; NaN where there is no label.
        prior: another regression posterior; None: N(0, gamma I).
        gamma: prior variance, where ``prior`` is None.

    Returns:
        The posterior, in float64 where a tensor is, else in float32.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: options, values (CPU), a precision that no jitter factorises.
    """
    likelihood = Gaussian()
    targets = likelihood.check("regression_posterior", features, targets)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    zero = torch.zeros(targets.shape[1], features.shape[1], dtype=dtype, device=features.device)
    anchor = zero
    if isinstance(prior, Posterior) and prior.anchor.shape == zero.shape:
        anchor = prior.mean.to(zero)
    return empty_posterior(likelihood, anchor, prior, gamma, "full").add(features, targets)


def _classification_posterior(
    likelihood: Likelihood,
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    prior: Posterior | None,
    gamma: float,
    structure: str,
) -> Posterior:
    targets = likelihood.check(f"{likelihood}_posterior", features, targets, None, weight)
    dtype = torch.float64 if torch.float64 in (features.dtype, weight.dtype) else torch.float32
    anchor = weight.detach().to(dtype, copy=True)  # the caller's weights go on training
    return empty_posterior(likelihood, anchor, prior, gamma, structure).add(features, targets)


@torch.no_grad()
def binary_posterior(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    prior: Posterior | None = None,
    gamma: float = DEFAULT_GAMMA,
    structure: str = "full",
) -> Posterior:
    """Make the Laplace posterior over [O, P] weights of O binary tasks, expanded at ``weight``.

    Args:
        features: [B, D].
        targets: [B, O] (or [B] for one output), 0, 1 or between; NaN where there is no label.
        weight: [O, P], bias last.
        prior: another binary posterior; None: N(0, gamma I).
        gamma: prior variance, where ``prior`` is None.
        structure: "full", one P x P block per output ("block" and "kron" are the same here), or "diag".

    Returns:
        The posterior, in float64 where a tensor is, else in float32.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: options, values (CPU), a precision that no jitter factorises.
    """
    return _classification_posterior(Bernoulli(), features, targets, weight, prior, gamma, structure)


@torch.no_grad()
def multiclass_posterior(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    prior: Posterior | None = None,
    gamma: float = DEFAULT_GAMMA,
    structure: str = "full",
) -> Posterior:
    """Make the Laplace posterior over [C, P] weights of one softmax task, expanded at ``weight``.

    Args:
        features: [B, D].
        targets: [B] int64; -100 where there is no label.
        weight: [C, P], bias last.
        prior: another multiclass posterior of the same structure; None: N(0, gamma I).
        gamma: prior variance, where ``prior`` is None.
        structure: "full" [C*P, C*P], "block" [C, P, P], "kron" ([C, C], [P, P]) or "diag" [C, P].

    Returns:
        The posterior, in float64 where a tensor is, else in float32.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: options, values (CPU), a precision that no jitter factorises.
    """
    return _classification_posterior(Categorical(), features, targets, weight, prior, gamma, structure)
