"""Stacks to test, each with its eager twin: made from the same draws, differentiated, named alike."""

from __future__ import annotations

import pytest
import torch

from fusedres import FusedResidualStack
from fusedres.reference import ResidualStack

SIZES_A = [3] * 13 + [1]
STACKS = {
    "system-a": (SIZES_A, {}),
    "system-a-plain": (SIZES_A, {"skip": None}),
    "system-d": ([12, 8, 4, 4, 4, 2, 1], {"skip": "projection"}),
    "system-e": ([6] * 8, {"activation": "none"}),
    "one-layer": ([5, 5], {}),
    "width-one": ([1, 1, 1, 1], {"learn_branch_scale": "channel", "learn_skip_scale": True}),
    "linear-head": ([7, 7, 7, 7], {"last_activation": "none"}),
    "post": ([4, 9, 9, 9, 2], {"order": "post", "activation": "relu", "learn_skip_scale": True}),
    "tanh-gelu": ([4, 9, 9], {"approximate": "tanh", "branch_scale": 0.5, "skip_scale": 0.9}),
    "learned-scalars": ([6, 6, 6, 6], {"learn_skip_scale": True, "learn_branch_scale": "scalar", "branch_scale": 0.5}),
    "learned-channels": ([6, 6, 6, 3, 3], {"learn_branch_scale": "channel", "skip": "projection", "activation": "sin"}),
    "numbers-by-layer": ([5, 5, 5, 5], {"skip_scale": [0.9, 1.0, 1.1], "branch_scale": [1.0, 0.0, -1.0]}),
    "starts-by-layer": ([5, 5, 5, 2], {"skip_scale": [0.9, 1.0, 1.1], "learn_skip_scale": True}),
    "drop-path": ([6, 6, 6, 6, 2], {"drop_path": 0.4, "learn_branch_scale": "scalar", "learn_skip_scale": True}),
    "drop-path-by-layer": ([6, 6, 6, 6, 2], {"drop_path": [0.0, 0.2, 0.5, 0.0]}),
    "two-runs": ([6, 6, 6, 4, 4, 4, 6], {"skip": "projection", "last_activation": "none"}),
}
every_stack = pytest.mark.parametrize(("sizes", "options"), STACKS.values(), ids=STACKS)


def twins(sizes, options, device="cpu", **more):
    torch.manual_seed(0)
    fused = FusedResidualStack(sizes, **options, **more).to(device)
    torch.manual_seed(0)
    return fused, ResidualStack(sizes, **options).to(device)


def gradients(model, x, g):
    """y, and every gradient by eager's name."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    y = model(x)
    dx, *found = torch.autograd.grad(y, (x, *parameters), g)
    named = dict(zip(names, found, strict=True))
    return {"y": y.detach(), "dx": dx, **(model.by_layer(named) if isinstance(model, FusedResidualStack) else named)}


def kind_of(name):
    """What the rules call a tensor of this name."""
    if name in ("y", "dx"):
        return name
    if "scales" in name:
        return "dskip_scale" if "skip" in name else "dbranch_scale"
    return "d" + name.rpartition(".")[2]
