"""A recipe of three kinds of tasks in float64, without dropout: what differs is more than rounding."""

import torch
from torch import nn

from mtlgrad.recipes import RMSE, MultiTaskNet, Recipe, Tensors, binary, linear_heads, multiclass, regression
from mtlgrad.recipes.alphavil import AlphaVILTraining
from mtlgrad.recipes.training import Job, Training

CPU = torch.device("cpu")


class Small(Recipe):
    epochs = 2
    batch_size = 8
    rows = 48  # batches of one size, on two ranks too

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        count = self.rows + 60
        x = torch.randn(count, 6, generator=draw, dtype=torch.float64)
        z = x[:, :3] + 0.5 * x[:, 3:] + torch.randn(count, 3, generator=draw, dtype=torch.float64)
        targets = {"a": z[:, 0], "b": (z[:, 1] > 0).double(), "c": (z[:, 2] > -0.5).long() + (z[:, 2] > 0.5).long()}
        self.tasks = [regression("a", RMSE, scale=3.0), binary("b"), multiclass("c")]
        data = Tensors(x, targets)
        parts = torch.arange(count).tensor_split([self.rows, self.rows + 30])
        self.train, self.validation, self.test = (data.only(part) for part in parts)

    def model(self):
        backbone = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        return MultiTaskNet(backbone, linear_heads(4, {"a": 1, "b": 1, "c": 3})).double()


class Listed(Small):
    """The same as an ordinary data set of single items, which a DataLoader collates."""

    def __init__(self, seed=0):
        super().__init__(seed)
        parts = (self.train, self.validation, self.test)
        self.train, self.validation, self.test = ([part[i] for i in range(len(part))] for part in parts)


def begun(method, recipe=None, epochs=2, seed=0, task=None, lr=1e-2, preference=None):
    recipe = Small() if recipe is None else recipe
    arguments = (recipe, Job(method, seed, lr, task), epochs, recipe.batch_size, CPU)
    return AlphaVILTraining(*arguments, "a") if method == "alphavil" else Training(*arguments, preference)


def trained(method, **options):
    training = begun(method, **options)
    while training.epoch < training.epochs:
        training.run_epoch(quiet)
    return training


def quiet(epoch, step, losses):
    pass
