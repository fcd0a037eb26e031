"""What layers of a trained stack are worth: the loss without each of them, and without half of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import Network
from ..stack import FusedResidualStack


class Lesions:
    """Of (stem, stack, head), whose stack is of one width and learns none of its scales; nothing drops."""

    def __init__(self, model: nn.Sequential) -> None:
        self.stem, stack, self.head = model[0], cast(FusedResidualStack, model[1]), model[2]
        self.recipe, own = stack.recipe, stack.by_layer()
        self.weights, self.biases = (
            torch.stack([own[f"layers.{i}.0.{name}"].detach() for i in range(self.depth)])
            for name in ("weight", "bias")
        )

    @property
    def depth(self) -> int:
        return len(self.recipe.layers)

    def without(self, *layers: int) -> Network:
        """The stack, going from the layer before each of these straight to the layer after."""
        kept = [i for i in range(self.depth) if i not in layers]
        scales = {
            name: [[getattr(self.recipe.layers[i], name) for i in kept]]  # of the one run that they are
            for name in ("skip_scale", "branch_scale")
        }
        options = self.recipe.options | scales | {"drop_path": 0.0}
        return Network([self.weights[kept]], [self.biases[kept]], **options)

    def losses(self, images: Tensor, labels: Tensor) -> list[float]:
        """Without each layer in turn; infinite where the outputs are."""
        return [self._loss(images, labels, layer) for layer in range(self.depth)]

    def halved(self, images: Tensor, labels: Tensor) -> list[float]:
        """Without every second layer: without the first, third, … one, and without the others."""
        return [self._loss(images, labels, *range(first, self.depth, 2)) for first in (0, 1)]

    def _loss(self, images: Tensor, labels: Tensor, *layers: int) -> float:
        shorter = self.without(*layers)
        return loss(lambda x: self.head(shorter(self.stem(x))), images, labels)


def loss(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Cross-entropy over all images [n, 64]."""
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()
