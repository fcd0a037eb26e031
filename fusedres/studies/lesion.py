"""What single layers of a trained stack are worth: the loss without each of them."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stack import FusedResidualStack


def without(stack: FusedResidualStack, layer: int) -> FusedResidualStack:
    """A copy of a stack of one width that goes from the layer before straight to the layer after; nothing drops."""
    recipe = stack.recipe
    scales = {
        name: [getattr(one, name) for i, one in enumerate(recipe.layers) if i != layer]
        for name in ("skip_scale", "branch_scale")
    }
    options = recipe.options | scales | {"drop_path": 0.0}
    shorter = FusedResidualStack(recipe.sizes[1:], **options, device="meta").to_empty(device=_device(stack))
    kept = [i for i in range(len(recipe.layers)) if i != layer]
    own, found = stack.by_layer(), {}
    for place, i in enumerate(kept):
        for name in ("weight", "bias"):
            found[f"layers.{place}.0.{name}"] = own[f"layers.{i}.0.{name}"].detach()
    shorter.load_state_dict(found)
    return shorter.eval()


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Cross-entropy over all images [n, 64]."""
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


def losses(model: nn.Sequential, images: Tensor, labels: Tensor) -> list[float]:
    """Of (stem, stack, head) without each layer of the stack in turn; infinite where the outputs are."""
    stem, stack, head = model[0], cast(FusedResidualStack, model[1]), model[2]
    shorter = (without(stack, layer) for layer in range(len(stack.layers)))
    return [loss(nn.Sequential(stem, one, head), images, labels) for one in shorter]


def _device(stack: FusedResidualStack) -> torch.device:
    return next(stack.parameters()).device
