"""Readouts of how gradient reaches the layers of a model: profiles, comparisons, pictures."""

from .compare import GradientComparison, compare_gradients
from .profile import GradientProfile, gradient_profile

__all__ = ["GradientComparison", "GradientProfile", "compare_gradients", "gradient_profile"]
