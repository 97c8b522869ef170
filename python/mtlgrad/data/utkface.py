"""UTKFace (Zhang et al., CVPR 2017): a face -> age, gender, ethnicity."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..recipes.backbones import resnet18
from ..recipes.recipe import MultiTaskNet, Recipe, TrainError, linear_heads, random_split
from ..recipes.tasks import binary, multiclass, regression
from .files import WORKERS, ImageFiles, data_folder

SOURCE = "UTKFace's aligned and cropped faces, [age]_[gender]_[race]_[date].jpg, from susanqq.github.io/UTKFace"
#: Age, gender, race; or age and one label of which the name does not tell which it is.
NAME = re.compile(r"(\d{1,3})_(?:([01])_([0-4])|_?\d)_\d{8,}[^_]*\.jpe?g", re.IGNORECASE)
SIZE = 64


class UTKFace(Recipe):
    """23,708 faces in $MTLGRAD_DATA/utkface; a random split for each seed, 70 % training, 10 % validation.

    Split, batch size, epochs and the 256 features after a ResNet-18 are those of the code published with BayesAgg-MTL
    (Achituve et al., arXiv 2402.04005); not so the images of 64 x 64, in place of crops of 128 x 128, nor AUC for the
    gender, a task of two classes there. Three faces of the distribution have one label in place of gender and race:
    their age counts, the rest is missing.
    """

    name = "utkface"
    epochs = 100
    evaluation_batch_size = 128
    workers = WORKERS

    def __init__(self, seed: int):
        folder = data_folder("utkface", SOURCE)
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        if len(names) < 10:
            raise TrainError(f"{folder}: expected {SOURCE}, found {len(names)} images")
        ages, genders, races = [], [], []
        for name in names:
            found = NAME.fullmatch(name)
            if found is None:
                raise TrainError(
                    f"{folder / name}: expected [age]_[gender]_[race]_[date].jpg with gender 0 or 1 and race 0 to 4, "
                    "found another name; move it out of the folder"
                )
            age, gender, race = found.groups()
            ages.append(float(age))
            genders.append(float(gender or "nan"))
            races.append(int(race or "-100"))
        rows = random_split(len(names), 0.7, 0.1, seed)
        age = torch.tensor(ages)
        mean, scale = age[rows[0]].mean(), float(age[rows[0]].std().clamp_min(1e-6))
        self.tasks = [
            regression("age", scale=scale, unit="years", digits=2),
            binary("gender"),
            multiclass("ethnicity"),
        ]
        targets = {"age": (age - mean) / scale, "gender": torch.tensor(genders), "ethnicity": torch.tensor(races)}

        def split(part: Tensor, mirrored: bool = False) -> ImageFiles:
            paths = [folder / names[row] for row in part.tolist()]
            return ImageFiles(paths, {task: values[part] for task, values in targets.items()}, SIZE, mirrored)

        self.train, self.validation, self.test = split(rows[0], mirrored=True), split(rows[1]), split(rows[2])

    def model(self) -> nn.Module:
        backbone = nn.Sequential(resnet18(), nn.Linear(512, 256), nn.ELU())
        return MultiTaskNet(backbone, linear_heads(256, {"age": 1, "gender": 1, "ethnicity": 5}))
