"""DTensor's rules for a layer, tensor parallelism, FSDP, DDP and pipelines, on 2 and 4 processes against one."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec

import fully_sharded
import pytest
import sharded
import torch.distributed
from torchrun import torchrun

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What failed, by case, on so many processes, which run once."""

    @cache
    def run(name, processes):
        out = tmp_path_factory.mktemp("cases") / "failed.json"
        script = "sharded" if name == "triton" else "fully_sharded"  # which has the other's cases too
        ran = torchrun(processes, f"tests/{script}.py", out, **({"TRITON_INTERPRET": "1"} if name == "triton" else {}))
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture
def failed(request, found, run):
    """Triton, which is interpreted, keeps for backward what the engine does not."""
    name, processes = run.split("-")
    if name == "engine":
        request.getfixturevalue("engine")
    elif find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return found(name, int(processes))


@pytest.mark.parametrize("case", sharded.EVERY)
@pytest.mark.parametrize("run", ["engine-2", "engine-4", "triton-2"])
def test_many_compute_what_one_does(failed, case):
    assert not failed[case], failed[case]


@pytest.mark.parametrize("case", fully_sharded.EVERY)
@pytest.mark.parametrize("run", ["engine-2", "engine-4"])
def test_many_train_as_one_does(failed, case):
    assert not failed[case], failed[case]
