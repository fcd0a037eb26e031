"""Other people's models: residual layers found in what their modules do, and fused in place."""

from .models import fuse_, unfuse_
from .report import FusedLayer, FuseReport, LeftLayer

__all__ = ["FuseReport", "FusedLayer", "LeftLayer", "fuse_", "unfuse_"]
