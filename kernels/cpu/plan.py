"""A network's plan, int64 [layers, 17] on the CPU: all that the engine has to know of it beside its tensors.

    0 N   1 K   2 activation   3 is_post   4 skip
    5 to 10 the slots of weight, bias, projection_weight, projection_bias, skip_scale, branch_scale   11 slice
    12 λ   13 a   14 drop_path   15 drop_threshold   16 keep_scale

λ, a, drop_path and keep_scale are the bits of doubles; activation and skip are indices in `kernels/spec.py`. As an
operator's arguments a network is codes (words 0 to 11, and how many layers they are for, which differ by their slice
alone) and numbers (12 to 14) instead: they read well in a graph, and a deep network of equal layers passes few.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..spec import ACTIVATIONS, ORDERS, SUMMED_SKIPS, LayerSpec, NetworkLayer, NetworkSpec, Slots

CODES, NUMBERS = 13, 3  # of equal layers: N, K, activation, order, skip, six slots, slice, count; λ, a, drop_path


def plan(spec: NetworkSpec) -> Tensor:
    if spec._plan is None:
        spec._plan = _plan(spec)
    return spec._plan


@torch.inference_mode(False)
def _plan(spec: NetworkSpec) -> Tensor:
    def bits(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device="cpu").view(torch.int64)

    specs = [layer.spec for layer in spec.layers]
    thresholds = torch.tensor([s.drop_threshold for s in specs], dtype=torch.int64, device="cpu")
    columns = [
        torch.tensor([[*_codes(layer), layer.slice] for layer in spec.layers], dtype=torch.int64, device="cpu"),
        bits([number for layer in spec.layers for number in _numbers(layer)]).view(-1, NUMBERS),
        thresholds[:, None],
        bits([s.keep_scale for s in specs])[:, None],
    ]
    return torch.cat(columns, 1)


def _codes(layer: NetworkLayer) -> list[int]:
    """All but the slice."""
    spec = layer.spec
    indices = ACTIVATIONS.index(spec.activation), ORDERS.index(spec.order), SUMMED_SKIPS.index(spec.skip)
    return [layer.N, layer.K, *indices, *layer.slots]


def _numbers(layer: NetworkLayer) -> list[float]:
    return [layer.spec.skip_scale, layer.spec.branch_scale, layer.spec.drop_path]


@lru_cache(maxsize=4096)
def layer_plan(spec: LayerSpec, N: int, K: int, has: tuple[bool, ...]) -> Tensor:
    """The plan of one layer, whose parameters stand in the order of `Slots`; `has` says which of them there are."""
    slots = Slots(*(sum(has[:i]) if is_there else -1 for i, is_there in enumerate(has)))
    return plan(NetworkSpec([NetworkLayer(spec, N, K, slots)]))


def encoded(spec: NetworkSpec) -> tuple[list[int], list[float]]:
    codes: list[int] = []
    numbers: list[float] = []
    for layer in spec.layers:
        own, scales = _codes(layer), _numbers(layer)
        is_like_before = codes[-CODES:-2] == own and numbers[-NUMBERS:] == scales
        if is_like_before and layer.slice == codes[-2] + codes[-1]:
            codes[-1] += 1
        else:
            codes += (*own, layer.slice, 1)
            numbers += scales
    return codes, numbers


@lru_cache(maxsize=256)
def decoded(codes: tuple[int, ...], numbers: tuple[float, ...]) -> NetworkSpec:
    layers = []
    for i in range(len(codes) // CODES):
        N, K, activation, order, skip, *slots, first, count = codes[i * CODES : (i + 1) * CODES]
        skip_scale, branch_scale, drop_path = numbers[i * NUMBERS : (i + 1) * NUMBERS]
        spec = LayerSpec(
            ACTIVATIONS[activation], ORDERS[order], SUMMED_SKIPS[skip], skip_scale, branch_scale, drop_path
        )
        layers += [NetworkLayer(spec, N, K, Slots(*slots), first + j) for j in range(count)]
    return NetworkSpec(layers)
