"""The heads of a model as BayesAgg sees them: which layers, which likelihood, which prior and exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin

from ..ops.checks import check_same_device
from ..ops.moments import power_tensor
from ..posterior.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ..posterior.posteriors import Posterior, check_gamma
from ..world.shards import full

DEFAULT_GAMMA = 0.1  # of classifiers
DEFAULT_POWER = 0.05

Layers = nn.Linear | nn.Conv2d | Sequence[nn.Linear | nn.Conv2d] | nn.ModuleList


def _sizes(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _is_linear(layer: nn.Conv2d) -> bool:
    same = (layer.kernel_size, layer.stride, layer.dilation) == ((1, 1),) * 3
    return same and layer.padding in ((0, 0), "valid", "same") and layer.groups == 1


class Head:
    """Common to the three kinds.

    Args:
        layers: one ``nn.Linear(D, O)``, or several (a sequence or ``nn.ModuleList``), whose outputs are stacked; of
            positions also ``nn.Conv2d(D, O, 1)``. What they return must be x W' + b, without hooks that change it.
        gamma: variance of the weights' prior N(0, gamma I). The published experiments use 0.005.
        power: exponent of the task's inverse variance in the weighted mean; 1 is the equation's, the published code's
            experiments use 0.1 to 0.5. One number, or one for each output.
    """

    likelihood: Likelihood

    def __init__(
        self,
        layers: Layers,
        gamma: float = DEFAULT_GAMMA,
        power: float | Sequence[float] | Tensor = DEFAULT_POWER,
    ):
        name = type(self).__name__
        listed: Any = layers if isinstance(layers, (Sequence, nn.ModuleList)) else (layers,)
        self.layers: tuple[nn.Linear | nn.Conv2d, ...] = tuple(listed)
        if not self.layers:
            raise ValueError(f"{name}: layers: expected at least one nn.Linear, found none")
        for layer in self.layers:
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                raise ValueError(f"{name}: layers: expected nn.Linear, found {type(layer).__name__}")
            if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
                raise ValueError(
                    f"{name}: layers: expected weights, found a {type(layer).__name__} without any; run a forward first"
                )
            if isinstance(layer, nn.Conv2d) and not _is_linear(layer):
                raise ValueError(f"{name}: layers: expected nn.Linear or a convolution of 1 x 1, found {layer}")
            if min(_sizes(layer)) < 1:
                raise ValueError(f"{name}: layers: expected at least one feature and one output, found {layer}")
            if layer.bias is None and not self.likelihood.is_exact:
                raise ValueError(f"{name}: layers: expected a bias, which the logit's posterior has, found bias=False")
        widths = {_sizes(layer)[0] for layer in self.layers}
        if len(widths) > 1:
            raise ValueError(f"{name}: layers: expected one number of input features, found {sorted(widths)}")
        self.width = widths.pop()
        self.outputs = sum(_sizes(layer)[1] for layer in self.layers)
        self.probe(name)
        check_gamma(gamma)
        self.gamma = float(gamma)
        values = power.tolist() if isinstance(power, Tensor) else power
        self.power = power_tensor(name, values, self.num_tasks, torch.device("cpu"))

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks that the outputs are."""
        return self.outputs

    @property
    def signature(self) -> str:
        """Return what a saved state must agree on."""
        return f"{self.likelihood} {self.width} -> {self.outputs}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.width} -> {self.outputs}, gamma={self.gamma}, power={self.power.tolist()})"

    def weight(self, like: Tensor) -> Tensor:
        """Copy the layers' weights.

        Args:
            like: a tensor of the dtype and device.

        Returns:
            [R, P], bias (zero where there is none) last.
        """
        return stacked_weights([self], like)

    def check(self, op: str, features: Tensor, targets: Tensor) -> Tensor:
        """Check a batch.

        Args:
            op: whose errors they are.
            features: [B, D].
            targets: [B, O] or [B].

        Returns:
            The targets, [B, O], or [B] for classes.

        Raises:
            RuntimeError: shapes, dtypes, devices.
            ValueError: what is no tensor; on the CPU also values.
        """
        check_same_device(op, "features", features=features, **{"the head's weight": self.layers[0].weight})
        weight_shape = (self.outputs, self.likelihood.width(self.width))
        return self.likelihood.check_targets(op, features, targets, weight_shape).detach()

    @torch.no_grad()
    def probe(self, op: str) -> None:
        """Refuse layers whose forward is another than x W' + b: adapters, hooks, quantised weights.

        Args:
            op: whose errors they are.

        Raises:
            ValueError: there is such a layer.
        """
        for layer in self.layers:
            plain = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
            if (plain and not layer._forward_hooks and not layer._forward_pre_hooks) or layer.weight.is_meta:
                continue
            x = torch.linspace(-1.0, 1.0, 2 * _sizes(layer)[0], dtype=layer.weight.dtype, device=layer.weight.device)
            x = x.view(2, -1, *([1, 1] if isinstance(layer, nn.Conv2d) else []))
            found, bias = layer(x), None if layer.bias is None else full(layer.bias)
            want = functional.linear(x.flatten(1), full(layer.weight).flatten(1), bias)
            if not isinstance(found, Tensor) or not torch.allclose(found.flatten(1), want, rtol=1e-2, atol=1e-2):
                raise ValueError(
                    f"{op}: layers: expected a forward of x W' + b, found a {type(layer).__name__} with another one; "
                    "merge the adapter into its weight, take away its hooks, or leave the head out"
                )

    def predict(self, features: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            features: [B, D].

        Returns:
            [B, O] or [B, C].
        """
        layers = [
            (full(layer.weight).flatten(1), None if layer.bias is None else full(layer.bias)) for layer in self.layers
        ]
        return torch.cat([functional.linear(features, weight, bias) for weight, bias in layers], -1)


def stacked_weights(heads: Sequence[Head], like: Tensor) -> Tensor:
    """Return :meth:`Head.weight` of several heads, one below the other."""
    layers = [layer for head in heads for layer in head.layers]
    rows = [full(layer.weight).flatten(1) for layer in layers]
    biases = [row.new_zeros(len(row)) if x.bias is None else full(x.bias) for x, row in zip(layers, rows)]
    return torch.cat([torch.cat(rows), torch.cat(biases)[:, None]], 1).to(like)


class Outputs:
    """What the heads make of a batch, at their weights as they stand, in float64: all that the statistics, the batch
    posteriors and the reading of the gradient need of it.

    Attributes:
        hidden: [B, P], the features and a one.
        weight: [K, P] of all heads, bias last, ``sizes`` rows of each; ``weights`` of each.
        logits: [B, K].
        terms: of each head; regressions with the same labelled rows have one curvature.
    """

    def __init__(self, heads: Sequence[Head], features: Tensor, targets: Sequence[Tensor], weight: Tensor):
        self.heads = heads
        self.hidden = functional.pad(features.double(), (0, 1), value=1.0)
        self.sizes = [head.outputs for head in heads]
        self.weight, self.weights = weight, weight.split(self.sizes)
        self.logits = self.hidden @ weight.T
        parts = self.logits.split(self.sizes, 1)
        self.terms = [head.likelihood.terms(z, target) for head, z, target in zip(heads, parts, targets)]
        self._hidden = {torch.float64: self.hidden}
        #: What heads that have the same compute once: by width and curvature, and by prior covariance and curvature.
        self.curvatures: dict[tuple[int, int], Tensor | None] = {}
        self.conditioned: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        if features.device.type == "cpu":
            self._find_the_same()

    def _find_the_same(self) -> None:
        known: list[Tensor] = []
        for i, (head, terms) in enumerate(zip(self.heads, self.terms)):
            mine = terms.curvature
            if not head.likelihood.is_exact or mine is None:
                continue
            same = [theirs for theirs in known if torch.equal(theirs, mine)]
            self.terms[i] = terms._replace(curvature=same[0]) if same else terms
            known += [] if same else [mine]

    def hidden_of(self, index: int, like: Tensor | None = None) -> Tensor:
        """Return [B, W], what the head's posterior multiplies its weights by; in the dtype of ``like``."""
        dtype = self.hidden.dtype if like is None else like.dtype
        if dtype not in self._hidden:
            self._hidden[dtype] = self.hidden.to(dtype)
        hidden = self._hidden[dtype]
        return hidden if self.heads[index].likelihood.bias else hidden[:, :-1]

    def curvature(self, index: int, posterior: Posterior) -> Tensor | None:
        """Return what the batch adds to the precision of a posterior of the head, where that is worth keeping."""
        hidden, terms = self.hidden_of(index), self.terms[index]
        key = hidden.shape[1], id(terms.curvature)
        if key not in self.curvatures:
            self.curvatures[key] = posterior.sum_curvature(hidden, terms)
        return self.curvatures[key]


class Regression(Head):
    """Squared error (w.h - y)^2, each output a task.

    Args:
        layers, gamma, power: as in :class:`Head`; with another noise than 1 the prior is N(0, gamma noise I).
        noise: variance of the targets about w.h. "estimated" is each output's mean squared residual at the full-data
            posterior's mean, anew with every posterior; 1.0 is the published model. The task's gradient is that of
            (w.h - y)^2 / noise, twice the one of the negative log likelihood: a task that is fitted well weighs more
            (DESIGN 4.2).
        bias: whether the posterior's weights have one, as a classifier's; None: if the layers have. False is the
            published model, for targets whose mean is zero.

    Raises:
        ValueError: layers that are not as :class:`Head` says, an option out of its range.
    """

    def __init__(
        self,
        layers: Layers,
        gamma: float = 1.0,
        power: float | Sequence[float] | Tensor = DEFAULT_POWER,
        noise: float | str = "estimated",
        bias: bool | None = None,
    ):
        self.likelihood = Gaussian(bias=False)
        super().__init__(layers, gamma, power)
        has_bias = any(layer.bias is not None for layer in self.layers)
        self.likelihood = Gaussian(bias=has_bias if bias is None else bool(bias))
        number = isinstance(noise, (int, float)) and 0 < noise < math.inf
        if not number and noise != "estimated":
            raise ValueError(f'Regression: noise: expected "estimated" or a finite variance above 0, found {noise!r}')
        self.noise = noise

    @property
    def signature(self) -> str:
        noise, bias = f", noise {self.noise}" if self.noise != 1.0 else "", ", bias" if self.likelihood.bias else ""
        return super().signature + noise + bias

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, noise={self.noise!r}, bias={self.likelihood.bias})"


class Binary(Head):
    """Binary cross entropy with logits, each output a task.

    Args:
        layers, gamma, power: as in :class:`Head`.

    Raises:
        ValueError: as :class:`Regression`; layers without a bias.
    """

    likelihood = Bernoulli()


class Multiclass(Head):
    """Softmax cross entropy; all classes are one task.

    Args:
        layers, gamma, power: as in :class:`Head`.

    Raises:
        ValueError: as :class:`Binary`.
    """

    likelihood = Categorical()

    @property
    def num_tasks(self) -> int:
        return 1
