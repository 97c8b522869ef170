"""Losses and metrics: against other formulas, with labels missing, batch by batch."""

import math

import pytest
import torch
from torch.nn import functional

from mtlgrad.recipes import AUC, MAE, RMSE, Accuracy, MeanIoU, absolute_error, binary, multiclass, regression


def labels(kind, missing):
    """Outputs and targets of 60 rows, some of them without a label."""
    torch.manual_seed(0)
    target = torch.randint(0, 5, (60,)) if kind == "multiclass" else torch.randn(60)
    target = (target > 0).float() if kind == "binary" else target
    target[missing] = -100 if kind == "multiclass" else math.nan
    return torch.randn(60, 5 if kind == "multiclass" else 1, requires_grad=True), target


@pytest.mark.parametrize("missing", [slice(0, 0), slice(0, 60, 3)])
@pytest.mark.parametrize("kind", ["regression", "absolute", "binary", "multiclass"])
def test_losses_are_means_over_what_is_labelled(kind, missing):
    output, target = labels("regression" if kind == "absolute" else kind, missing)
    there = target != -100 if kind == "multiclass" else ~target.isnan()
    loss, plain = {
        "regression": (regression("x").loss, functional.mse_loss),
        "absolute": (absolute_error, functional.l1_loss),
        "binary": (binary("x").loss, functional.binary_cross_entropy_with_logits),
        "multiclass": (multiclass("x").loss, functional.cross_entropy),
    }[kind]
    found = loss(output, target)
    wanted = plain(output[there] if kind == "multiclass" else output[there, 0], target[there])
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, output), torch.autograd.grad(wanted, output), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_a_batch_without_labels_has_a_loss_and_gradients_of_zero(kind):
    output, target = labels(kind, slice(None))
    task = {"regression": regression, "binary": binary, "multiclass": multiclass}[kind]("x")
    loss = task.loss(output, target)
    assert loss == 0.0
    assert torch.autograd.grad(loss, output)[0].abs().max() == 0.0
    metric = task.metric()
    assert math.isnan(metric.value())
    metric.update(output.detach(), target)
    assert math.isnan(metric.value())


def measured(metric, output, target, size):
    for a, b in zip(output.split(size), target.split(size), strict=True):
        metric.update(a.detach(), b)
    return metric.value()


@pytest.mark.parametrize("size", [1, 7, 60])
def test_metrics_do_not_depend_on_the_batches(size):
    output, target = labels("regression", slice(0, 5))
    error = (output.detach()[5:, 0] - target[5:]).double()
    assert measured(MAE(), output, target, size) == pytest.approx(float(error.abs().mean()), rel=1e-6)
    assert measured(RMSE(), output, target, size) == pytest.approx(float(error.square().mean().sqrt()), rel=1e-6)
    output, target = labels("multiclass", slice(0, 5))
    right = [int(output[i].argmax()) == int(target[i]) for i in range(5, 60)]
    assert measured(Accuracy(), output, target, size) == pytest.approx(sum(right) / 55)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_auc_against_every_pair(size):
    score, target = torch.randn(60, 1).mul(3).round(), (torch.rand(60) < 0.3).float()  # many ties
    target[:4] = math.nan
    positive, negative = score[target == 1, 0], score[target == 0, 0]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    assert measured(AUC(), score, target, size) == pytest.approx(float(wins.mean()), abs=1e-12)
    assert math.isnan(measured(AUC(), score, torch.zeros(60), size))


def test_mean_iou_against_sets():
    output, target = torch.randn(4, 6, 5, 5), torch.randint(0, 5, (4, 5, 5))  # class 5 is in no label
    target[0, 0] = -100
    found = output.argmax(1)
    ratios = []
    for c in range(6):
        a, b = (found == c) & (target != -100), target == c
        ratios += [float((a & b).sum()) / float((a | b).sum())] if (a | b).any() else []
    assert measured(MeanIoU(), output, target, 1) == pytest.approx(sum(ratios) / len(ratios))
