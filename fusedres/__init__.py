"""Residual layers y = λ s(x) + a φ(x Wᵀ + b), fused forward and backward, and how gradient reaches them."""

from . import requirement  # noqa: F401 : first, as it raises

# isort: split
from . import functional, reference
from .dispatch import batch_invariant, eager
from .explanation import explain
from .fusing import FuseReport, fuse_, unfuse_
from .gradients import GradientComparison, GradientProfile, compare_gradients, gradient_profile
from .mlp import FusedResidualMLP
from .modules import FusedResidualLinear
from .network import Network
from .residual import Residual
from .stack import FusedResidualStack
from .warming import warmup

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "FusedResidualLinear",
    "FusedResidualMLP",
    "FusedResidualStack",
    "GradientComparison",
    "GradientProfile",
    "Network",
    "Residual",
    "batch_invariant",
    "compare_gradients",
    "eager",
    "explain",
    "functional",
    "fuse_",
    "gradient_profile",
    "reference",
    "unfuse_",
    "warmup",
]
