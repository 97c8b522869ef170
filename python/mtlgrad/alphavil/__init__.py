"""alphaVIL (Kourdis, Gordon-Hall, Gorinski, arXiv 2405.07769): what each task's training is worth to one of them."""

from .method import AlphaVIL
from .records import Round, Stage
from .tasks import Task

__all__ = ["AlphaVIL", "Round", "Stage", "Task"]
