"""The README's examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_usage_examples() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(code, "README.md", "exec"), names)
    torch.testing.assert_close(names["bayes"].task_weights.sum(), torch.tensor(1.0))
    assert names["aligned"].rank == 2
    assert torch.isfinite(names["aligned"].weights).all()
