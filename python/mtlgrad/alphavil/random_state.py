"""The random state of a round: what must be put back for a stage to repeat itself bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


def generators_of(sources: Iterable[object]) -> list[torch.Generator]:
    """Return the generators that loaders were given; what they draw otherwise comes from torch's global one."""
    found: list[torch.Generator] = []
    for source in sources:
        batches = getattr(source, "batch_sampler", None)
        for holder in (source, getattr(source, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is known for known in found):
                found.append(generator)
    return found


def capture(generators: list[torch.Generator], device: torch.device) -> dict[str, Any]:
    """torch (on the host and on `device`), numpy, Python and loaders: what `torch.load(weights_only=True)` reads."""
    # The legacy generator is the one that augmentations use unless they bring their own.
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
        "loaders": [generator.get_state() for generator in generators],
    }


def restore(state: dict[str, Any], generators: list[torch.Generator], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, one in zip(generators, state["loaders"], strict=True):
        generator.set_state(one.cpu())
