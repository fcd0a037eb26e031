"""DTensor's rules for a layer, and the styles of tensor parallelism, on 2 and 4 processes against one."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec

import pytest
import torch.distributed
from sharded import EVERY
from torchrun import torchrun

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What failed, by case, on so many processes, which run once."""

    @cache
    def run(name, processes):
        out = tmp_path_factory.mktemp("sharded") / "failed.json"
        ran = torchrun(processes, "tests/sharded.py", out, **({"TRITON_INTERPRET": "1"} if name == "triton" else {}))
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(params=["engine-2", "engine-4", "triton-2"])
def failed(request, found):
    """Triton, which is interpreted, keeps for backward what the engine does not."""
    name, processes = request.param.split("-")
    if name == "engine":
        request.getfixturevalue("engine")
    elif find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return found(name, int(processes))


@pytest.mark.parametrize("case", EVERY)
def test_many_compute_what_one_does(failed, case):
    assert not failed[case], failed[case]
