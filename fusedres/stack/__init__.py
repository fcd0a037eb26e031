"""Whole residual networks as one module."""

from .module import FusedResidualStack

__all__ = ["FusedResidualStack"]
