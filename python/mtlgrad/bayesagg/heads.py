"""The heads of a model as BayesAgg sees them: which layers, which likelihood, which prior and exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.checks import check_same_device
from ..ops.moments import power_tensor
from ..posterior.likelihoods import Likelihood, check_batch
from ..posterior.posteriors import DEFAULT_GAMMA, check_gamma
from ..world.shards import full


class Head:
    """Common to the three kinds.

    Args:
        layers: one ``nn.Linear(D, O)``, or several (a sequence or ``nn.ModuleList``), whose outputs are stacked.
        gamma: variance of the weights' prior N(0, gamma I).
        power: exponent of the task's inverse variance in the weighted mean; 1 is the equation's, the published code's
            experiments use 0.1 to 0.5. One number, or one for each output.
    """

    likelihood: Likelihood

    def __init__(
        self,
        layers: nn.Linear | Sequence[nn.Linear] | nn.ModuleList,
        gamma: float = DEFAULT_GAMMA,
        power: float | Sequence[float] | Tensor = 1.0,
    ):
        name = type(self).__name__
        listed: Any = layers if isinstance(layers, (Sequence, nn.ModuleList)) else (layers,)
        self.layers: tuple[nn.Linear, ...] = tuple(listed)
        if not self.layers:
            raise ValueError(f"{name}: layers: expected at least one nn.Linear, found none")
        for layer in self.layers:
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"{name}: layers: expected nn.Linear, found {type(layer).__name__}")
            if layer.out_features < 1 or layer.in_features < 1:
                raise ValueError(f"{name}: layers: expected at least one feature and one output, found {layer}")
            if layer.bias is None and self.likelihood != "regression":
                raise ValueError(f"{name}: layers: expected a bias, which the logit's posterior has, found bias=False")
        widths = {layer.in_features for layer in self.layers}
        if len(widths) > 1:
            raise ValueError(f"{name}: layers: expected one number of input features, found {sorted(widths)}")
        self.width = widths.pop()
        self.outputs = sum(layer.out_features for layer in self.layers)
        check_gamma(gamma)
        self.gamma = float(gamma)
        values = power.tolist() if isinstance(power, Tensor) else power
        self.power = power_tensor(name, values, self.num_tasks, torch.device("cpu"))

    @property
    def num_tasks(self) -> int:
        return self.outputs

    @property
    def signature(self) -> str:
        """What a saved state must agree on."""
        return f"{self.likelihood} {self.width} -> {self.outputs}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.width} -> {self.outputs}, gamma={self.gamma}, power={self.power.tolist()})"

    def weight(self, like: Tensor) -> Tensor | None:
        """A copy [R, P] of the weights, bias last, in the dtype of ``like``; None for regression, whose posterior is
        exact."""
        rows = [torch.cat([full(layer.weight), full(layer.bias)[:, None]], 1) for layer in self.layers]
        return torch.cat(rows).to(like)

    def check(self, op: str, features: Tensor, targets: Tensor) -> Tensor:
        """The targets, [B, O] or [B] for classes, or an error that names what is wrong with them."""
        check_same_device(op, "features", features=features, **{"the head's weight": self.layers[0].weight})
        width = self.width + (self.likelihood != "regression")
        return check_batch(op, self.likelihood, features, targets, (self.outputs, width)).detach()

    def predict(self, features: Tensor) -> Tensor:
        layers = [(full(layer.weight), None if layer.bias is None else full(layer.bias)) for layer in self.layers]
        return torch.cat([functional.linear(features, weight, bias) for weight, bias in layers], -1)


class Regression(Head):
    """Squared error (w.h - y)^2, each output a task. The posterior has no bias, as published.

    Args:
        layers, gamma, power: as in :class:`Head`; with another noise than 1 the prior is N(0, gamma noise I).
        noise: variance of the targets about w.h. 1.0 is the published model; "estimated" is each output's mean squared
            residual at the full-data posterior's mean, anew with every refresh. The task's gradient is that of
            (w.h - y)^2 / noise, twice the one of the negative log likelihood: a task that is fitted well weighs more
            (DESIGN 4.2).
    """

    likelihood = "regression"

    def __init__(
        self,
        layers: nn.Linear | Sequence[nn.Linear] | nn.ModuleList,
        gamma: float = DEFAULT_GAMMA,
        power: float | Sequence[float] | Tensor = 1.0,
        noise: float | str = 1.0,
    ):
        super().__init__(layers, gamma, power)
        number = isinstance(noise, (int, float)) and 0 < noise < math.inf
        if not number and noise != "estimated":
            raise ValueError(f'Regression: noise: expected "estimated" or a finite variance above 0, found {noise!r}')
        self.noise = noise

    @property
    def signature(self) -> str:
        return super().signature + (f", noise {self.noise}" if self.noise != 1.0 else "")

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, noise={self.noise!r})"

    def weight(self, like: Tensor) -> None:
        return None


class Binary(Head):
    """Binary cross entropy with logits, each output a task."""

    likelihood = "binary"


class Multiclass(Head):
    """Softmax cross entropy; all classes are one task."""

    likelihood = "multiclass"

    @property
    def num_tasks(self) -> int:
        return 1
