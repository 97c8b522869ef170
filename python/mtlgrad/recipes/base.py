"""What every recipe offers, and the settings and errors that the rest of this room shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from ..ops.align import Scale

Kind = Literal["regression", "binary", "multiclass"]
ADAM = "adam"  #: the optimizer, unless the user says otherwise


class TrainError(Exception):
    """Something the user can put right; its text is the one line that the command line prints."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised between two steps, never inside one."""


@dataclass(frozen=True)
class Task:
    """One head: its kind, the width of its output, and the metric it is judged by."""

    name: str
    kind: Kind
    outputs: int
    metric: str
    higher_is_better: bool
    unit: str = ""
    digits: int = 4  #: of the metric, behind the point


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; kept in its checkpoint, so that resuming needs no arguments."""

    data: str = "clothing"
    methods: tuple[str, ...] = ("bayesagg",)
    optimizers: tuple[str, ...] = (ADAM,)
    seeds: int = 3
    epochs: int = 8  #: the clothing recipe's; every recipe has its own, which the command line takes
    batch_size: int = 128
    lr: float | None = None  #: the optimizer's own, of RATES in optimizers.py, if None
    # BayesAgg's own. Measured on the validation split, three seeds, Delta_m where the plain sum has -0.48 +- 0.06, all
    # with sd 0.27 or less: these -0.47; the published gamma 0.005 -0.37; warm-up of 3 or 6 epochs -0.40, -0.46; power
    # 0.1 for all -0.44; full covariance -0.48, at three to five times the cost. Two seeds: warm-up of 2 epochs -0.36,
    # then power 0.5 or 1 for all (the equation's own) at gamma 0.005 +1.3, +1.8.
    gamma: float = 0.1
    power: tuple[float, float] = (0.05, 0.05)  #: regression, classification
    warmup: int = 4
    covariance: str = "block"
    preference: tuple[float, ...] | None = None  #: one number a task, of those that have one; their own default if None
    scale: Scale = "min"  #: Aligned-MTL's
    target: str | None = None  #: the task that alphavil and diw train the others for
    # alphaVIL's own (diw shares the first); its optimizers and the size of its development batches are in rounds.py.
    # Measured on one seed of clothing, validation RMSE, heads weighed too: subset 0.5 0.6651 (1.0 at half the learning
    # rate 0.6651, 0.25 0.6687), with heads left alone 0.6592; subset 0.25 with a descent on alpha by SGD in place of
    # LBFGS 0.6829, by Adam 0.6914; the plain sum 0.6772.
    subset: float = 0.5  #: of an epoch's batches, which a task is trained on in a round
    alpha_epochs: int = 1  #: steps of LBFGS, each of several evaluations
    device: str = "cpu"
    #: A second thread gains a fifth on an idle machine; on a busy one the two wait for each other (seen: 30 times).
    threads: int = 1
    tensorboard: bool = False  #: whether what is in the tables also goes to TensorBoard

    @property
    def trainings(self) -> list[tuple[str, str]]:
        """Every method with every optimizer."""
        return [(method, optimizer) for method in self.methods for optimizer in self.optimizers]

    @property
    def labels(self) -> list[str]:
        """What `trainings` are called, in their order."""
        return [label(*training) for training in self.trainings]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`; raises TypeError for unknown names."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
        return Settings(**known)


@dataclass(frozen=True)
class Job:
    """One training: a method on all tasks, or (``task`` given) a single-task net for the comparison."""

    method: str
    seed: int
    task: int | None = None
    optimizer: str = ADAM

    @property
    def label(self) -> str:
        return label(self.method, self.optimizer)

    def title(self, tasks: Sequence[Task]) -> str:
        """For people: "bayesagg, seed 0" or "rating alone, seed 0"; `tasks` are all of the recipe's."""
        return f"{self.label if self.task is None else tasks[self.task].name + ' alone'}, seed {self.seed}"


def label(method: str, optimizer: str) -> str:
    """In tables, files and figures: "sum", or "sum + adatask-adam"."""
    return method if optimizer == ADAM else f"{method} + {optimizer}"


class Round(TypedDict):
    """What alphavil or diw did between two sets of task weights; lists have an entry a task."""

    alphas: list[float] | None  #: diw has none
    weights: list[float]  #: after the round
    sat_out: list[bool]  #: whether the task's training came to NaN or infinity, and made no difference
    kept: str | None  #: alphavil: of mtlgrad.alphavil.Round
    before: float  #: the target's development loss
    after: list[float]  #: likewise; diw: after each task's training, alphavil: after the round, for all tasks the same


@dataclass
class Result:
    """What a finished training leaves behind; plain numbers and small tensors, so that a checkpoint can hold all."""

    job: Job
    tasks: list[str]
    metrics: list[float]  #: on the test split, per task
    losses: list[float]  #: on the test split, per task
    step_ms: list[float]  #: wall time of the timed steps
    own_ms: list[float]  #: of each of those, what the method itself took; none (alphavil) where that is not known
    epoch_ms: list[float]  #: what the method did between epochs, spread over the epoch's steps
    history: list[dict[str, Any]] = field(default_factory=list)
    variance: Tensor | None = None  #: [T, D] mean gradient variance in the last epoch (bayesagg)
    condition: list[float] = field(default_factory=list)  #: of the gradients, in the timed steps (aligned, aligned-ub)
    rank: list[int] = field(default_factory=list)  #: likewise
    rounds: list[Round] = field(default_factory=list)  #: of alphavil and diw

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Result:
        return Result(**{**values, "job": Job(**values["job"])})


class MultiTaskNet(nn.Module):
    """A backbone to [B, D] and one linear head a task."""

    def __init__(self, backbone: nn.Module, heads: list[nn.Linear]):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)

    def features(self, *inputs: Tensor) -> Tensor:
        """What a part's batches yield -> [B, D]."""
        features: Tensor = self.backbone(*inputs)
        return features

    def outputs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per task [B, O], of the features that its head gets."""
        return [head(own) for head, own in zip(self.heads, features, strict=True)]

    def losses(
        self,
        tasks: Sequence[Task],
        features: Sequence[Tensor],
        targets: Sequence[Tensor],
        divisor: float | None = None,
    ) -> list[Tensor]:
        """Per task the batch's loss; `divisor` as in `task_loss`."""
        return [task_loss(t, o, y, divisor) for t, o, y in zip(tasks, self.outputs(features), targets, strict=True)]


def task_loss(task: Task, output: Tensor, target: Tensor, divisor: float | None = None) -> Tensor:
    """The batch mean of the per-sample loss: squared error, BCE with logits, or cross entropy.

    With `divisor` their sum over that, of a batch whose other rows are elsewhere: rows without a label (NaN, -100) add
    nothing.
    """
    if divisor is not None:
        return _loss_sum(task, output, target) / divisor
    if task.kind == "multiclass":
        return nn.functional.cross_entropy(output, target)
    if task.kind == "binary":
        return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target)
    squares: Tensor = (output.squeeze(1) - target) ** 2
    return squares.mean()


def _loss_sum(task: Task, output: Tensor, target: Tensor) -> Tensor:
    if task.kind == "multiclass":
        return nn.functional.cross_entropy(output, target, reduction="sum")
    labelled, output = ~target.isnan(), output.squeeze(1)
    target = target.nan_to_num()
    if task.kind == "binary":
        losses = nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none")
    else:
        losses = (output - target) ** 2
    return (losses * labelled).sum()
