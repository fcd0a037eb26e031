"""A network's plan, int64 [layers, 16] on the CPU: all that the engine has to know of it beside its tensors.

    0 N   1 K   2 activation   3 is_post   4 skip   5 λ   6 a   7 drop_threshold   8 keep_scale
    9 to 14 the slots of weight, bias, projection_weight, projection_bias, skip_scale, branch_scale   15 slice

λ, a and keep_scale are the bits of doubles; activation and skip are indices in `kernels/spec.py`. As an operator's
arguments a network is codes (integers) and numbers instead, which say the same and read well in a graph.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..spec import ACTIVATIONS, ORDERS, SUMMED_SKIPS, LayerSpec, NetworkLayer, NetworkSpec, Slots

CODES, NUMBERS = 12, 3  # a layer's codes: N, K, activation, order, skip, six slots, slice; numbers: λ, a, drop_path


def plan(spec: NetworkSpec) -> Tensor:
    if spec._plan is None:
        spec._plan = _plan(spec)
    return spec._plan


@torch.inference_mode(False)
def _plan(spec: NetworkSpec) -> Tensor:
    numbers = [(s.skip_scale, s.branch_scale, s.keep_scale) for s, *_ in spec.layers]
    skip_scales, branch_scales, keep_scales = (
        torch.tensor(column, dtype=torch.float64, device="cpu").view(torch.int64).tolist()
        for column in zip(*numbers, strict=True)
    )
    words = []
    for i, layer in enumerate(spec.layers):
        activation, is_post, skip = _indices(layer.spec)
        scales = (skip_scales[i], branch_scales[i], layer.spec.drop_threshold, keep_scales[i])
        words.append((layer.N, layer.K, activation, is_post, skip, *scales, *layer.slots, layer.slice))
    return torch.tensor(words, dtype=torch.int64, device="cpu")


def _indices(spec: LayerSpec) -> tuple[int, int, int]:
    return ACTIVATIONS.index(spec.activation), ORDERS.index(spec.order), SUMMED_SKIPS.index(spec.skip)


@lru_cache(maxsize=4096)
def layer_plan(spec: LayerSpec, N: int, K: int, has: tuple[bool, ...]) -> Tensor:
    """The plan of one layer, whose parameters stand in the order of `Slots`; `has` says which of them there are."""
    slots = Slots(*(sum(has[:i]) if is_there else -1 for i, is_there in enumerate(has)))
    return plan(NetworkSpec([NetworkLayer(spec, N, K, slots)]))


def encoded(spec: NetworkSpec) -> tuple[list[int], list[float]]:
    codes: list[int] = []
    numbers: list[float] = []
    for layer in spec.layers:
        codes += (layer.N, layer.K, *_indices(layer.spec), *layer.slots, layer.slice)
        numbers += (layer.spec.skip_scale, layer.spec.branch_scale, layer.spec.drop_path)
    return codes, numbers


@lru_cache(maxsize=256)
def decoded(codes: tuple[int, ...], numbers: tuple[float, ...]) -> NetworkSpec:
    layers = []
    for i in range(len(codes) // CODES):
        N, K, activation, order, skip, *slots, slice = codes[i * CODES : (i + 1) * CODES]
        skip_scale, branch_scale, drop_path = numbers[i * NUMBERS : (i + 1) * NUMBERS]
        spec = LayerSpec(
            ACTIVATIONS[activation], ORDERS[order], SUMMED_SKIPS[skip], skip_scale, branch_scale, drop_path
        )
        layers.append(NetworkLayer(spec, N, K, Slots(*slots), slice))
    return NetworkSpec(layers)
