"""Data-parallel training with torch.distributed: what users need beside the methods' ``process_group=``."""

from .jacobians import average_jacobians
from .means import global_means

__all__ = ["average_jacobians", "global_means"]
