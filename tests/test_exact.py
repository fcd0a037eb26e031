"""Kernels on integers, where every result is exact and has to be equal: each shipped tile, and each way of the C++
engine, at its ragged edges."""

import random

import exact_cpu
import pytest
from configurations import KERNELS, MODES, STACK_KERNELS, largest, shipped, shipped_forms, shipped_stacks
from exact import GPU, TARGET, Case, StackCase, capability, cases, mismatches, stack_cases, stack_mismatches
from exact_forms import FormCase, form_cases, form_mismatches
from integers import HAS_GPU

from fusedres.kernels.spec import WAYS


def _cases() -> list[Case]:
    """Natively the largest tiles, since each is a compilation (`bench/exact.py` does all); interpreted, every tile."""
    every = shipped(TARGET, capability())
    chosen = [c for c in every if HAS_GPU or c.mode in ("fp32", "fp16")]  # bf16 wrong, tf32 ignored there
    if HAS_GPU:
        chosen = largest(chosen)
    else:
        few = set(largest(chosen))
        chosen = [c for c in chosen if c in few or c.is_ragged]
    return cases(chosen, is_small=True)


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_every_element_is_exact(case):
    assert mismatches(case, seed=0) == []


def _stack_cases() -> list[StackCase]:
    """Natively of the heaviest run; interpreted, padded widths alone: what those prove, whole ones share."""
    every = shipped_stacks(TARGET, capability())
    if HAS_GPU:
        return [case for case in stack_cases(every, is_small=True) if case.stack == "everything"]
    chosen = [c for c in every if c.mode in ("fp32", "fp16") and c.is_ragged]
    return stack_cases(chosen, is_small=True)


@pytest.mark.parametrize("case", _stack_cases(), ids=str)
def test_every_element_of_a_run_is_exact(case):
    assert stack_mismatches(case, seed=0) == []


def _form_cases() -> list[FormCase]:
    """fp16 compiles to what bf16 does; the interpreter knows no other of 16 bits, and runs the tiles of every chip."""
    few = ("fp32", "tf32", "bf16") if HAS_GPU else ("fp32", "fp16")
    chips = [capability()] if HAS_GPU else [80, 90, 100]
    forms = dict.fromkeys(c for chip in chips for c in shipped_forms("cuda", chip, GPU) if c.mode in few)
    return list(form_cases(forms, is_small=True))


@pytest.mark.parametrize("case", _form_cases(), ids=str)
def test_every_element_of_another_form_is_exact(case):
    assert form_mismatches(case, seed=0) == []


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
    found = shipped(TARGET, capability())
    assert {c.kernel for c in found} == set(KERNELS)
    assert {c.mode for c in found} == set(MODES)
    stacks = shipped_stacks(TARGET, capability())
    assert {c.kernel for c in stacks} == set(STACK_KERNELS)
    assert {c.mode for c in stacks} == set(MODES)
