"""ChestX-ray14 (Wang et al., CVPR 2017): a radiograph of the chest -> which of 14 findings its report has."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import nn

from ..recipes.backbones import resnet18
from ..recipes.recipe import MultiTaskNet, Recipe, TrainError, linear_heads
from ..recipes.tasks import binary
from .files import WORKERS, ImageFiles, data_folder, existing, split_off

SOURCE = "{} of the NIH's ChestX-ray14, from nihcc.app.box.com/v/ChestXray-NIHCC"
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
SIZE = 224


def read_findings(path: Path) -> dict[str, list[float]]:
    """Read the table: an image's name -> 1 or 0 a finding."""
    table = {}
    with existing(path, SOURCE.format("the table")).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            lines = list(csv.DictReader(file))
        except csv.Error as error:
            raise TrainError(f"{path}: expected a table, found a file that cannot be read: {error}") from None
    for line in lines:
        name, words = line.get("Image Index"), line.get("Finding Labels")
        found = set((words or "").split("|")) - {"No Finding"}
        if not name or not words or not found <= set(FINDINGS):
            wanted = "Image Index, and Finding Labels out of the 14 or No Finding"
            raise TrainError(f"{path}: expected {wanted}, found {name!r} with {words!r}")
        table[name] = [float(finding in found) for finding in FINDINGS]
    return table


class ChestXray(Recipe):
    """112,120 images in $MTLGRAD_DATA/chestxray; the set's own test patients, 10 % of the others for validation.

    There: Data_Entry_2017.csv, train_val_list.txt, test_list.txt and all images in images/. Batch size, epochs,
    images of 224 x 224 and the 256 features are those of the code published with BayesAgg-MTL (Achituve et al., arXiv
    2402.04005); the ResNet-18, in place of a ResNet-34 that knows ImageNet, whole images without augmentation, and the
    validation patients, drawn for each seed, are ours.
    """

    name = "chestxray"
    tasks = tuple(binary(name) for name in FINDINGS)
    epochs = 100
    batch_size = 256
    evaluation_batch_size = 128
    workers = WORKERS

    def __init__(self, seed: int):
        folder = data_folder("chestxray", SOURCE.format("the folder"))
        findings = read_findings(folder / "Data_Entry_2017.csv")
        images = {path.name for path in existing(folder / "images", SOURCE.format("all images"), folder=True).iterdir()}

        def split(names: list[str]) -> ImageFiles:
            labels = torch.tensor([findings[name] for name in names])
            targets = dict(zip(FINDINGS, labels.unbind(1), strict=True))
            return ImageFiles([folder / "images" / name for name in names], targets, SIZE)

        lists = []
        for path in (folder / "train_val_list.txt", folder / "test_list.txt"):
            names = existing(path, SOURCE.format("the list")).read_text(errors="replace").split()
            for name in names:
                if name not in findings:
                    raise TrainError(f"{path}: expected images that are in Data_Entry_2017.csv, found {name}")
                if name not in images:
                    raise TrainError(f"{folder / 'images' / name}: expected an image listed in {path.name}, found none")
            lists.append(names)
        patients = sorted({name.partition("_")[0] for name in lists[0]})
        if len(patients) < 2 or not lists[1]:
            raise TrainError(f"{folder}: expected two patients to train on and a test image, found fewer")
        held_out = {patients[row] for row in split_off(len(patients), seed)[1].tolist()}
        self.train = split([name for name in lists[0] if name.partition("_")[0] not in held_out])
        self.validation = split([name for name in lists[0] if name.partition("_")[0] in held_out])
        self.test = split(lists[1])

    def model(self) -> nn.Module:
        backbone = nn.Sequential(resnet18(), nn.Linear(512, 256), nn.ELU())
        return MultiTaskNet(backbone, linear_heads(256, dict.fromkeys(FINDINGS, 1)))
