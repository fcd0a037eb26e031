"""DTensor's rules for a layer, tensor parallelism, FSDP, DDP and pipelines, on 2 and 4 processes against one."""

from __future__ import annotations

import json
from importlib.util import find_spec

import fully_sharded
import pytest
import sharded
import torch.distributed
from torchrun import torchrun

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.usefixtures("engine")
def test_many_compute_and_train_as_one_does(processes, tmp_path):
    ran = torchrun(processes, "tests/fully_sharded.py", tmp_path / "failed.json")
    check(ran, tmp_path / "failed.json", sharded.EVERY | fully_sharded.EVERY)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernels_keep_what_backward_reads(tmp_path):
    """The engine's operator keeps nothing, so that nothing of it is laid out."""
    ran = torchrun(2, "tests/sharded.py", tmp_path / "failed.json", TRITON_INTERPRET="1")
    check(ran, tmp_path / "failed.json", sharded.EVERY)


def check(ran, out, cases):
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found.keys() == cases.keys()
    failed = {name: text for name, text in found.items() if text}
    assert not failed, "\n".join([", ".join(failed), *failed.values()])
