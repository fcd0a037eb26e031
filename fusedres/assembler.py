"""ptxas, which turns Triton's code into a GPU's, and which of its versions are to be trusted with what.

On Hopper, ptxas before 13.3 may use registers again that an asynchronous product still reads its first operand from
(triton-lang/triton#11781). Kernels with such products run under an older one only after the integer-exact sweep
(`python bench/exact.py --record`) has passed with it on that GPU: tiles/swept.json.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

SAFE = (13, 3)
SWEPT = Path(__file__).parent / "tiles" / "swept.json"


@lru_cache(maxsize=1)
def ptxas() -> str:
    """The version of the one that Triton runs, "12.8", or "unknown"."""
    try:
        from triton import knobs

        return str(knobs.nvidia.ptxas.version)
    except Exception:  # private to Triton, or no tool that runs
        return "unknown"


def trusts_register_operands(gpu: str, capability: int, version: str | None = None) -> bool:
    """Whether products that read an operand from registers may run: on Hopper alone they are asynchronous.

    version: of ptxas, where it is not the one that Triton runs.
    """
    if capability // 10 != 9:
        return True
    version = version or ptxas()
    found = re.match(r"(\d+)\.(\d+)", version)
    is_safe = found is not None and (int(found[1]), int(found[2])) >= SAFE
    return is_safe or (gpu, version) in _swept()


@lru_cache(maxsize=1)
def _swept() -> frozenset[tuple[str, str]]:
    if not SWEPT.is_file():
        return frozenset()
    return frozenset((row["gpu"], row["ptxas"]) for row in json.loads(SWEPT.read_text())["sweeps"])
