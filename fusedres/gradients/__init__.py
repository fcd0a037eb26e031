"""Readouts of how gradient reaches the layers of a model: profiles, recordings, comparisons, pictures."""

from .compare import GradientComparison, compare_gradients
from .readout import GradientProfile, profile
from .readout import profile as gradient_profile
from .recorder import Recorder
from .statistics import Halves, InputGradient, Statistics

__all__ = [
    "GradientComparison",
    "GradientProfile",
    "Halves",
    "InputGradient",
    "Recorder",
    "Statistics",
    "compare_gradients",
    "gradient_profile",
    "profile",
]
