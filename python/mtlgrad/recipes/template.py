"""My recipe: what `mtlgrad train --recipe THIS_FILE` needs to compare methods on my data.

It runs as it is, on numbers that are made up. Put your data in __init__ and your model in model(); then

    mtlgrad train --recipe my_recipe.py --methods sum logsum bayesagg aligned-ub --seeds 3
    mtlgrad train --recipe my_recipe.py --methods sum logsum bayesagg aligned-ub --seeds 3 --tune-lr
"""

import torch
from torch import nn

from mtlgrad.recipes import (
    MultiTaskNet,
    Recipe,
    Tensors,
    binary,
    multiclass,
    random_split,
    regression,
    standardised,
    standardised_labels,
)


class MyRecipe(Recipe):
    epochs = 10
    batch_size = 128

    def __init__(self, seed):
        # From a CSV beside this file: table = pandas.read_csv(Path(__file__).parent / "my.csv"), then
        # torch.tensor(table[columns].to_numpy(), dtype=torch.float32); a text's numbers are
        # table[column].astype("category").cat.codes, with -1, not -100, where it is missing.
        # Any torch Dataset will do in place of Tensors: its items are (inputs, {"task's name": target}).
        inputs, price, sold, kind = made_up()
        train, validation, test = random_split(len(inputs), 0.6, 0.2, seed)

        # A regression's labels are best standardised; with `scale` and `unit` errors are told in the labels' own unit.
        price, scale = standardised_labels(price, train)

        # A task: its name, in the targets and the heads. A missing label is NaN (standardised_labels leaves it so), for
        # classes -100. Another loss or metric: mtlgrad.recipes.Task("name", loss=my_loss, metric=MyMetric).
        self.tasks = [regression("price", scale=scale, unit="$", digits=2), binary("sold"), multiclass("kind")]
        targets = {"price": price, "sold": sold, "kind": kind}

        # Inputs: what is missing (NaN) becomes the mean.

        data = Tensors(standardised(inputs, train), targets)
        self.train, self.validation, self.test = data.only(train), data.only(validation), data.only(test)

    def model(self):
        # Anything with .backbone and .heads. The backbone gets the inputs (a tuple or a dict as its arguments), a head
        # the features. Heads for bayesagg are nn.Linear.
        backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        return MultiTaskNet(backbone, {"price": nn.Linear(32, 1), "sold": nn.Linear(32, 1), "kind": nn.Linear(32, 3)})


def made_up(count=4000):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 20, generator=draw)
    hidden = torch.tanh(inputs @ torch.randn(20, 8, generator=draw) / 3)
    price = 200 + 50 * hidden[:, 0] + 20 * hidden[:, 1] * hidden[:, 2] + 10 * torch.randn(count, generator=draw)
    sold = (hidden[:, 1] + hidden[:, 3] + 0.5 * torch.randn(count, generator=draw) > 0).float()
    kind = (hidden[:, 3:6] + 0.3 * torch.randn(count, 3, generator=draw)).argmax(1)
    return inputs, price, sold, kind
