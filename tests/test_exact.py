"""Kernels on integers, where every result is exact and has to be equal: each shipped tile, and each way of the C++
engine, at its ragged edges."""

import random

import exact_cpu
import pytest
from configurations import KERNELS, MODES, largest, shipped
from exact import HAS_GPU, TARGET, Case, cases, mismatches

from fusedres.kernels.spec import WAYS


def _cases() -> list[Case]:
    """Natively the largest tiles, since each is a compilation (`bench/exact.py` does all); interpreted, every tile."""
    chosen = [c for c in shipped(TARGET) if HAS_GPU or c.mode in ("fp32", "fp16")]  # bf16 wrong, tf32 ignored there
    if HAS_GPU:
        chosen = largest(chosen)
    else:
        few = set(largest(chosen))
        chosen = [c for c in chosen if c in few or c.is_ragged]
    return cases(chosen, is_small=True)


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_every_element_is_exact(case):
    assert mismatches(case, seed=0) == []


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", exact_cpu.DTYPES.values(), ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_element_of_the_engine_is_exact(way, dtype, backend):
    """On every layer and at the edges of every block: some of the cases of `bench/exact_cpu.py`."""
    mode = next(name for name, value in exact_cpu.DTYPES.items() if value == dtype)
    some = random.Random(0).sample(list(exact_cpu.cases(way, mode)), 60)
    wrong = {str(case): found for case in some if (found := exact_cpu.mismatches(case, seed=0))}
    assert not wrong


def test_every_kernel_and_mode_ships():
    found = shipped(TARGET)
    assert {c.kernel for c in found} == set(KERNELS)
    assert {c.mode for c in found} == set(MODES)
