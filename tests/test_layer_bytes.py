"""The bytes that a layer's kernels are said to move are those that the interpreter loads and stores, form by form."""

from __future__ import annotations

from collections import Counter
from typing import Any

import layer_bytes
import numpy as np
import pytest
import torch
from layer_bytes import Kernel, Size

from fusedres.kernels.config import (
    Elementwise,
    Inside,
    PersistentTile,
    Plan,
    Separate,
    SplitTile,
    StackTile,
    Tile,
    Together,
)
from fusedres.kernels.spec import LayerSpec, Operands, Wanted

pytest.importorskip("triton")

SIZE = Size(M=150, N=48, K=48, itemsize=2)
SPEC = LayerSpec("gelu", skip="identity")
POINTERS, TILED = Tile(32, 16, 32, 4, 2), PersistentTile(32, 32, 16, 4, 2, parts=2, group=2)
PROGRAMS = 2  # fewer than there are tiles
FORWARD = {
    "pointers": POINTERS,
    "tiled": TILED,
    "whole": PersistentTile(32, 64, 64, 4, 2, residents=2),
    "whole, the skip read again": PersistentTile(32, 64, 128, 4, 2),
    "around the library": Elementwise(32, 32, 4),
}
BACKWARD = {
    "pointers": Separate(POINTERS._replace(BLOCK_M=64), POINTERS),
    "dx by the library": Separate(POINTERS, None),
    "inside, several across": Inside(TILED),
    "inside, one across": Inside(PersistentTile(32, 64, 16, 4, 2)),
    "together": Together(StackTile(16, 4, 2)),
}
WEIGHT = {
    "one share": SplitTile(32, 16, 16, 4, 2, 1),
    "shares": SplitTile(32, 16, 16, 4, 2, 3),
    "shares by descriptors": SplitTile(16, 32, 16, 4, 2, 3, by_descriptors=True),
}


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch, device: str) -> Counter:
    """Bytes loaded and stored from now on."""
    if device != "cpu":
        pytest.skip("a GPU counts nothing for us")
    interpreter = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    found: Counter = Counter()

    def counting(name: str, what: str, place: int) -> None:
        call = getattr(interpreter, name)

        def counted(pointers: Any, *arguments: Any, **options: Any) -> Any:
            mask = options["mask"] if "mask" in options else arguments[place]
            found[what] += int(np.asarray(mask.data).sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return call(pointers, *arguments, **options)

        monkeypatch.setattr(interpreter, name, counted)

    counting("create_masked_load", "loaded", 0)
    counting("create_masked_store", "stored", 1)
    return found


def operands() -> Operands:
    M, N, K, _ = SIZE
    return Operands(*(torch.randn(shape).half() for shape in ((M, K), (N, K), (N,))))


def stated(kernels: list[Kernel]) -> dict[str, int]:
    """Of our kernels: the library's and torch's own load nothing here."""
    mine = [kernel for kernel in kernels if kernel.issues is not None or kernel.name == "sums"]
    read = sum(sum(kernel.reads.values()) + kernel.cached for kernel in mine)
    return {"loaded": read, "stored": sum(sum(kernel.writes.values()) for kernel in mine)}


@pytest.mark.parametrize("keeps", [False, True], ids=["", "keeps"])
@pytest.mark.parametrize("form", FORWARD.values(), ids=FORWARD)
def test_forward(form, keeps, moved):
    from fusedres.kernels.triton import layer, layer_library, layer_persistent

    if isinstance(form, Tile):
        layer.forward(operands(), SPEC, torch.float16, form, "ieee", keeps, False)
    elif isinstance(form, Elementwise):
        layer_library.forward(operands(), SPEC, torch.float16, form, keeps, False)
    else:
        layer_persistent.forward(operands(), SPEC, torch.float16, form, "ieee", keeps, PROGRAMS)
    assert moved == stated(layer_bytes.forward(form, SIZE, keeps, PROGRAMS))


@pytest.mark.parametrize("form", BACKWARD.values(), ids=BACKWARD)
def test_backward(form, moved):
    from fusedres.kernels.triton import layer_backward, layer_narrow

    g, wanted = torch.randn(SIZE.M, SIZE.N).half(), Wanted(True, True, True, *[False] * 5)
    if isinstance(form, Together):
        layer_narrow.backward(g, operands(), SPEC, wanted, form.rows, 2 * PROGRAMS, "ieee")
    else:
        kept = torch.rand(SIZE.M, SIZE.N).half()
        layer_backward.backward(g, operands(), kept, None, SPEC, wanted, form, None, "ieee", PROGRAMS)
    assert moved == stated(layer_bytes.backward(Plan(TILED, TILED, form, None), SIZE, PROGRAMS))


@pytest.mark.parametrize("tile", WEIGHT.values(), ids=WEIGHT)
def test_weight(tile, moved):
    from fusedres.kernels.triton.weight_gradient import weight_gradient

    dz, x = torch.randn(SIZE.M, SIZE.N).half(), torch.randn(SIZE.M, SIZE.K).half()
    weight_gradient(dz, x, torch.float16, tile, "ieee", PROGRAMS)
    assert moved == stated(layer_bytes.weight(tile, SIZE))


def test_a_layer_as_a_hopper_is_given_it():
    """In passes: narrow training has its partial sums beside 5, the middle 9, the wide 11; the floor stays under it."""
    for d, passes in ((64, 6), (512, 9), (2048, 11)):
        plan, size = layer_bytes.plans.plan_of(layer_bytes.layer_facts(d)), Size(65536, d, d, 2)
        kernels = layer_bytes.training(plan, size, layer_bytes.PROGRAMS)
        found = sum(kernel.moved for kernel in kernels) / size.x
        assert passes <= found < passes + 0.3
        assert layer_bytes.least(size, True) / size.x <= found
