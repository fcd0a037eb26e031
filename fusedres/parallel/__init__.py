"""Layers past one device, on PyTorch's own engine: DTensor's rules, styles for `parallelize_module`, pipeline stages.

Imported on demand (`import fusedres.parallel`), since torch.distributed.tensor takes its time.
"""

from . import sharding
from .pipeline import stages
from .styles import FusedColwiseParallel, FusedRowwiseParallel

__all__ = ["FusedColwiseParallel", "FusedRowwiseParallel", "sharding", "stages"]
