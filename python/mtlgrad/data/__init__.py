"""Real data small enough to ship inside the package; see README.md beside this file for sources and licences."""

from .clothing import ClothingReviews, load_clothing
from .river import RiverFlow, load_river

__all__ = ["ClothingReviews", "RiverFlow", "load_clothing", "load_river"]
