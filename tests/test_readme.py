"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_usage_example() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    shares = names["bayes"].task_weights  # type: ignore[attr-defined]
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
