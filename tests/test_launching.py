"""Launches that know their kernel again hand the launcher what Triton's own way does, on a GPU that is not there.

In a process of its own: kernels are compiled there, in this one they are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SMALL, LARGE = 2**31 - 1, 2**62 + 1


def compared() -> dict[str, dict[str, object]]:
    """By call: whether ours launched what Triton's way does, at first and again; how often Triton was asked again."""
    sys.path.insert(0, str(BENCH))
    from launch_cost import by_triton, launched, replaced
    from pretended import pretended

    # isort: split
    import torch

    from fusedres import FusedResidualLinear, FusedResidualStack, Residual, philox
    from fusedres.kernels.triton import launching

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape).half()

    layer, wide = FusedResidualLinear(64).half(), half(16, 129)
    bare, learned = FusedResidualLinear(64, bias=False).half(), FusedResidualLinear(64, learn_skip_scale=True).half()
    dropping, described = FusedResidualLinear(64, drop_path=0.5).half(), FusedResidualLinear(512).half()
    stack = FusedResidualStack((64,) * 4).half()
    scaled = FusedResidualStack((64,) * 4, skip_scale=[0.5, 1.0, 2.0], learn_branch_scale="channel").half()
    calls = {
        "plain": (layer, half(16, 64)),
        "another dtype": (FusedResidualLinear(64), torch.randn(16, 64)),
        "fewer rows": (layer, half(8, 64)),
        "other strides": (layer, half(16, 128)[:, :64]),
        "a stride that 16 does not divide": (layer, wide[:, :64]),
        "an address that 16 does not divide": (layer, half(16, 128)[:, 1:65]),
        "no bias": (bare, half(16, 64)),
        "a learned scale": (learned, half(16, 64)),
        "a seed of 32 bits": (dropping, half(16, 64)),
        "a seed of 64 bits": (dropping, half(16, 64)),
        "many rows": (layer, half(80, 64)),
        "rows by pointers": (layer, half(80, 65)[:, 1:]),
        "descriptors": (described, half(80, 512)),
        "descriptors of another dtype": (FusedResidualLinear(512).bfloat16(), torch.randn(80, 512).bfloat16()),
        "a stack": (stack, half(80, 64)),
        "a stack with a tensor of scales": (scaled, half(80, 64)),
        "the sum of a block": (Residual(torch.nn.Identity(), learn_skip_scale=True).half(), half(3, 64)),
        "the sum of a block of one column": (Residual(torch.nn.Identity(), learn_skip_scale=True).half(), half(3, 1)),
    }
    found = {}
    run = launching.JITFunction.run
    asked = []
    launching.JITFunction.run = lambda self, *args, **kwargs: (asked.append(self), run(self, *args, **kwargs))[1]
    for capability, names in ((90, calls), (80, ("plain", "many rows", "a stack")), (90, calls)):  # then all are known
        with pretended(capability) as driver:
            for name in names:
                module, x = calls[name]
                philox.draw_seed = lambda name=name: torch.tensor(SMALL if "32" in name else LARGE)
                x, g = x.detach().requires_grad_(), torch.randn_like(x)

                def call(module=module, x=x, g=g) -> object:
                    return torch.autograd.grad(module(x), [x, *module.parameters()], g)

                with replaced(by_triton):
                    expected = launched(driver, call)
                with replaced():
                    first = launched(driver, call)
                    asked.clear()
                    again = launched(driver, call)
                found[f"{name}, {capability}"] = {
                    "same": expected == first == again,
                    "launches": len(first),
                    "asked": len(asked),
                }
    launching.MOST, _ = 1, launching._known.clear()
    with pretended() as driver, replaced():
        launched(driver, call)
    found["known at most"] = {"launches": len(launching._known)}
    return found


def test_launches_that_are_known_are_those_of_triton():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert len(found) > 20
    assert found.pop("known at most")["launches"] == 1
    for name, call in found.items():
        assert call["same"], name
        assert call["asked"] == 0, f"Triton was asked again: {name}"
        assert call["launches"] > 0, name


@pytest.mark.slow
def test_host_costs_are_reported(tmp_path):
    file = tmp_path / "cost.json"
    command = [sys.executable, str(BENCH / "launch_cost.py"), "--budget-s", "0", "--json", str(file)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    record = json.loads(file.read_text())
    assert record["kind"] == "launch cost"
    assert len(record["cases"]) == len(child.stdout.splitlines())
    for name, row in record["cases"].items():
        assert row["launches"] == len(row["arguments"]), name
        for figures in (row["microseconds"], row["of the first launch"]):
            assert all(times["median"] > 0 for times in figures.values())


if __name__ == "__main__":
    print(json.dumps(compared()))
