"""QM9: a molecule's Coulomb spectrum and composition -> 11 of its properties. Needs the package qm9pack."""

from __future__ import annotations

import ast
import csv
import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..recipes.recipe import (
    MultiTaskNet,
    Recipe,
    Tensors,
    TrainError,
    linear_heads,
    random_split,
    standardised,
    standardised_labels,
)
from ..recipes.tasks import regression

MOLECULES = 10_000
#: A property -> its column in the package, and its unit.
PROPERTIES = {
    "mu": ("Dipole_debye", "D"),
    "alpha": ("Polarizability_bohr3", "bohr³"),
    "homo": ("HOMO_au", "Ha"),
    "lumo": ("LUMO_au", "Ha"),
    "r2": ("R2_bohr2", "bohr²"),
    "zpve": ("ZPVE_au", "Ha"),
    "U0": ("InternalEnergy_0K_au", "Ha"),
    "U": ("InternalEnergy_298K_au", "Ha"),
    "H": ("Enthalphy_298K_au", "Ha"),
    "G": ("GibbsFreeEnergy_298K_au", "Ha"),
    "cv": ("Heatcapacity_Cv_cal_mol_K", "cal/mol K"),
}
ENERGIES = ("zpve", "U0", "U", "H", "G")  #: mostly sums over the atoms
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


def coulomb_spectrum(elements: list[str], positions: list[list[float]]) -> Tensor:
    """Compute the Coulomb matrix's eigenvalues, the largest first, padded to 29 atoms."""
    charges = torch.tensor([ELEMENTS[e] for e in elements], dtype=torch.float64)
    points = torch.tensor(positions, dtype=torch.float64) / 0.529177  # in bohr
    matrix = charges[:, None] * charges / torch.cdist(points, points).fill_diagonal_(1.0)
    matrix.diagonal().copy_(0.5 * charges**2.4)
    values = torch.linalg.eigvalsh(matrix)
    return functional.pad(values[values.abs().argsort(descending=True)], (0, 29 - len(values)))


def molecules() -> dict[str, Tensor]:
    """Read a random slice of the package's: spectrum [N, 29], composition [N, 5], targets [N, 11]; then kept."""
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise TrainError("qm9: expected the package qm9pack, found none; pip install --no-deps qm9pack")
    cache = Path(tempfile.gettempdir(), f"mtlgrad_qm9_{MOLECULES}.pt")
    if cache.exists():
        kept: dict[str, Tensor] = torch.load(cache, weights_only=True)
        return kept
    every: list[dict[str, str]] = []
    for part in (1, 2, 3):
        with open(Path(spec.submodule_search_locations[0], "data", f"qm9_part{part}.csv"), newline="") as file:
            every += csv.DictReader(file)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(5))[:MOLECULES].tolist()
    spectrum, composition, targets = [], [], []
    for molecule in (every[i] for i in chosen):
        elements = ast.literal_eval(molecule["Elements"])
        spectrum.append(coulomb_spectrum(elements, ast.literal_eval(molecule["XYZ_Ang"])))
        composition.append([float(elements.count(e)) for e in ELEMENTS])
        targets.append([float(molecule[column]) for column, _ in PROPERTIES.values()])
    made = {"spectrum": torch.stack(spectrum)}
    made |= {"composition": torch.tensor(composition).double(), "targets": torch.tensor(targets, dtype=torch.float64)}
    torch.save(made, cache)
    return made


class QM9(Recipe):
    """10,000 molecules; energies less what is linear in the composition; a random split for each seed."""

    name = "qm9"
    epochs = 30

    def __init__(self, seed: int):
        data = molecules()
        targets, composition = data["targets"].clone(), data["composition"]
        rows = random_split(len(targets), 0.6, 0.1, seed)
        design = torch.cat([composition, torch.ones(len(targets), 1, dtype=torch.float64)], 1)
        energies = [list(PROPERTIES).index(name) for name in ENERGIES]
        targets[:, energies] -= design @ torch.linalg.lstsq(design[rows[0]], targets[rows[0]][:, energies]).solution
        self.tasks, labels = [], {}
        for (name, (_, unit)), values in zip(PROPERTIES.items(), targets.unbind(1), strict=True):
            labels[name], scale = standardised_labels(values, rows[0])
            self.tasks.append(regression(name, scale=scale, unit=unit))
        inputs = standardised(torch.cat([data["spectrum"], composition], 1), rows[0])
        split = Tensors(inputs, labels)
        self.train, self.validation, self.test = (split.only(part) for part in rows)

    def model(self) -> nn.Module:
        backbone = nn.Sequential(nn.Linear(34, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return MultiTaskNet(backbone, linear_heads(64, dict.fromkeys(PROPERTIES, 1)))
