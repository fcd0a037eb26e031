"""No shipped kernel spills on sm_90, and the lens that says so sees a spill where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def lens(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "bench/lens.py", "--jobs", str(os.cpu_count()), *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_no_shipped_kernel_spills(tmp_path):
    run = lens("--quick", "--json", tmp_path / "lens.json")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    kernels = json.loads((tmp_path / "lens.json").read_text())["kernels"]
    sums = {"sum_forward", "sum_backward"}
    forms = {"persistent", "inside", "narrow", "finish", "sums", "statistics"}  # dw in shares ships once measured
    assert {k["kernel"] for k in kernels} == {"forward", "dz", "dx", "stack_forward", "stack_backward"} | forms | sums
    by_descriptors = [k for k in kernels if k["kernel"] in ("persistent", "inside")]
    assert all(k["bulk_copies"] > 0 and k["loads"] < 100 for k in by_descriptors)
    assert all(k["from_registers"] == 0 for k in kernels if k["kernel"] in ("persistent", "narrow"))
    assert {k["mode"] for k in kernels} == {"fp32", "tf32", "fp16", "bf16"}
    without = {"dz", "finish", "sums", "statistics"} | sums
    for mode in ("tf32", "fp16", "bf16"):
        multiplying = [k for k in kernels if k["mode"] == mode and k["kernel"] not in without]
        assert all(k["products"] > 0 for k in multiplying)  # matrix units


def test_kernels_that_record_compile_for_sm_100():
    """There, sums of products go through memory of their own, and Triton compiles not every form of them."""
    run = lens("--arch", "sm_100", "--kernel", "dx", "stack_backward", "--mode", "bf16", "--aligned")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "recorded" in run.stdout


def test_a_tile_too_large_for_the_registers_is_found():
    run = lens("--arch", "sm_90", "--tile", "128,256,64,8,3", "--kernel", "forward", "--mode", "bf16", "--aligned")
    assert run.returncode == 1
    assert "forward-bf16-tensor-aligned-128x256x64-w8-s3 plain gelu: spills" in run.stdout


def test_a_tile_too_large_for_shared_memory_is_found():
    run = lens("--arch", "sm_80", "--tile", "128,128,64,8,7", "--kernel", "dx", "--mode", "bf16", "--aligned")
    assert run.returncode == 1
    assert "bytes of shared memory, has 101376" in run.stdout


def test_more_registers_than_there_are_is_a_fault():
    """As maxnreg allows: nothing spills, and the launch fails."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    code = (
        "from lens import Finding; print(*(Finding(255, threads).faults('sm_90') for threads in (256, 512)), sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.stdout == "|needs 131072 registers, has 65536\n"


def test_the_short_gelu_is_short():
    """A pass over 16 bits with gelu and its slope, in under two thirds of the instructions that erf and exp take."""
    code = """
from lens import Job, compile_job
from configurations import FormConfiguration
from fusedres.kernels.config import Elementwise
from fusedres.kernels.triton import layer
job = Job("sm_90", FormConfiguration("finish", "bf16", 1024, 1024, True, Elementwise(32, 128, 4)), "gelu", "plain")
short = compile_job(job)[1]
layer.formula = lambda activation, dtype: activation
long = compile_job(job)[1]
assert not (short.error or long.error), (short, long)
print(short.instructions / long.instructions)
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout.split()[-1]) < 2 / 3
