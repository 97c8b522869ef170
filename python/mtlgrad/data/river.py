"""River flow: eight sites of one network, each to be forecast from the past flows of all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILE = Path(__file__).with_name("river_flow.npz")


@dataclass(frozen=True)
class RiverFlow:
    """N = 9,125 hourly rows of flows at eight sites of the Mississippi network (RF1), in the observations' own unit."""

    inputs: Tensor  #: [N, 64] float32, all sites now and 6, 12, 18, 24, 36, 48 and 60 h ago; 3,264 are missing (NaN)
    targets: Tensor  #: [N, 8] float32, the flow at each site 48 h ahead; complete
    columns: tuple[str, ...]  #: 64 names, site and hours: "CHSI2__-6"
    sites: tuple[str, ...]  #: 8 names, the National Weather Service's: "CHSI2"


def load_river() -> RiverFlow:
    """Reads the file that ships with the package (about 20 ms); everything is on the CPU."""
    with np.load(_FILE, allow_pickle=False) as file:
        return RiverFlow(
            inputs=torch.from_numpy(file["inputs"]),
            targets=torch.from_numpy(file["targets"]),
            columns=tuple(file["input_names"].tolist()),
            sites=tuple(name.partition("_")[0] for name in file["target_names"].tolist()),
        )
