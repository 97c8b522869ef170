"""BayesAgg-MTL (Achituve et al., ICML 2024, arXiv 2402.04005): gradients averaged by inverse variance."""

from .heads import Binary, Multiclass, Regression
from .layer import BayesAgg

__all__ = ["BayesAgg", "Binary", "Multiclass", "Regression"]
