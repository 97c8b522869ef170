"""What an installed wheel must do: agree with its reference, share torch's OpenMP. Run by ``python -I -W error``."""

import re
import sys
from pathlib import Path

import torch

import mtlgrad

assert Path(mtlgrad.__file__).is_relative_to(sys.prefix), mtlgrad.__file__
assert mtlgrad.build_info()["openmp"]

torch.set_num_threads(2)  # so that a parallel region is entered on one core too
rows = torch.randn(4, 1 << 20).exp()
torch.testing.assert_close(mtlgrad.ops.gram(rows), mtlgrad.reference.gram(rows))

runtimes = set(re.findall(r"/\S*/lib(?:gomp|omp|iomp)\S*", Path("/proc/self/maps").read_text()))
assert len(runtimes) == 1, runtimes
print(f"mtlgrad {mtlgrad.__version__}, torch {torch.__version__}, one OpenMP runtime: {runtimes.pop()}")
