"""Real data small enough to ship inside the package; see README.md beside this file for sources and licences."""

from .clothing import ClothingReviews, load_clothing

__all__ = ["ClothingReviews", "load_clothing"]
