"""Which torch fusedres needs; imported before all else, so that an older one is told of in words."""

from __future__ import annotations

import re

import torch

OLDEST, TESTED = (2, 11), "2.11 to 2.13"


def told(version: str) -> str | None:
    """What is wrong with this version of torch; None where nothing is. Any newer one may run."""
    found = re.match(r"(\d+)\.(\d+)", version)  # a build of 2.11's own sources may be called 2.11.0a0
    if found is None or (int(found[1]), int(found[2])) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return f"fusedres needs torch {oldest} or newer, and this is torch {version}: pip install 'torch>={oldest}'"


if fault := told(torch.__version__):
    raise ImportError(fault)
