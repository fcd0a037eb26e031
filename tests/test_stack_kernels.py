"""Runs of layers in one kernel, by their launchers: outputs and every gradient against float64, and the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import stack_bytes
import torch
from test_layer import transposed
from tolerances import rule_for
from torch import Tensor

from fusedres import dispatch, reference
from fusedres.kernels.config import StackTile, StackTiles, Tile
from fusedres.kernels.spec import ACTIVATIONS, LayerSpec, Operands, Run, Wanted
from fusedres.kernels.triton import layer, stack, stack_backward

pytestmark = pytest.mark.backends("triton")
SMALL = StackTile(16, 4, 2)
NAMES = ("weight", "bias", "skip_scale", "branch_scale")
on_every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # Triton's interpreter computes bf16 wrongly
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


@dataclass(frozen=True)
class Case:
    """A run: its shape and options; scales "layer" and "channel" are learned, numbers are not."""

    d: int = 17
    L: int = 3
    M: int = 19
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    order: str = "pre"
    has_skip: bool = True
    skip_scale: float | str = "layer"
    branch_scale: float | str = "channel"
    bias: bool = True
    drop_path: tuple[float, ...] = ()  # of each layer, or of all
    keep_every: int = 1
    sums_weight: bool = True
    programs: int = 2
    BLOCK_K: int = 0

    @property
    def tile(self) -> StackTile:
        return SMALL._replace(BLOCK_K=self.BLOCK_K)

    def run(self, device: str) -> tuple[Tensor, Run]:
        """x and the run: weights scale as 1 / √d, so that rows stay near one."""
        L, d = self.L, self.d

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, self.dtype)

        p = torch.tensor(self.drop_path, dtype=torch.float64)
        run = Run(
            weight=(torch.randn(L, d, d) * d**-0.5).to(device, self.dtype),
            bias=make(L, d) if self.bias else None,
            skip_scale=make(L) if self.skip_scale == "layer" else self.skip_scale,
            branch_scale={"layer": make(L), "channel": make(L, d)}.get(self.branch_scale, self.branch_scale),
            activation=self.activation,
            order=self.order,
            has_skip=self.has_skip,
        )
        if self.drop_path:
            run = run._replace(
                seeds=torch.randint(2**63 - 1, (L,)).to(device),
                threshold=(p * 2**32).round().long().to(device) if len(p) == L else round(p.item() * 2**32),
                keep_scale=(1 / (1 - p)).float().to(device) if len(p) == L else 1 / (1 - p.item()),
            )
        return make(self.M, d), run

    def layers(self, h: Tensor, run: Run) -> Tensor:
        """The specification, applied layer by layer."""
        for i in range(self.L):
            own = run.layers(i, i + 1)
            learned = {name: t[0] for name in NAMES if isinstance(t := getattr(own, name), Tensor)}
            numbers = {
                name: value
                for name in ("skip_scale", "branch_scale")
                if not isinstance(value := getattr(own, name), Tensor)
            }
            p = self.drop_path[i % len(self.drop_path)] if self.drop_path else 0.0
            spec = LayerSpec(
                self.activation, self.order, "identity" if self.has_skip else "none", drop_path=p, **numbers
            )
            h = reference.layer(Operands(h, **learned, seed=None if run.seeds is None else run.seeds[i].cpu()), spec)
        return h


def learned(run: Run) -> dict[str, Tensor]:
    return {
        name: t
        for name in NAMES
        if isinstance(t := getattr(run, name), Tensor) and (name != "skip_scale" or run.has_skip)
    }


def everything(run: Run) -> Wanted:
    names = {"x", *learned(run)}
    return Wanted(*(name in names for name in Wanted._fields))


def fused(case: Case, x: Tensor, run: Run, g: Tensor) -> dict[str, Tensor]:
    """What the launchers give: y and every gradient."""
    y, kept = stack.forward(x, run, case.tile, "ieee", case.keep_every)
    assert kept.shape == ((case.L - 1) // case.keep_every, case.M, case.d)
    found = stack_backward.backward(
        g, x, kept, run, everything(run), StackTiles(case.tile, case.tile), "ieee",
        case.keep_every, case.programs, case.sums_weight,
    )  # fmt: skip
    return {"y": y, **{f"d{name}": t for name, t in found._asdict().items() if t is not None}}


def by_layers(case: Case, x: Tensor, run: Run, g: Tensor) -> dict[str, Tensor]:
    """What autograd gives for the specification."""
    leaves = {"x": x.detach().requires_grad_()} | {k: t.detach().requires_grad_() for k, t in learned(run).items()}
    y = case.layers(leaves["x"], run._replace(**{k: t for k, t in leaves.items() if k != "x"}))
    found = torch.autograd.grad(y, list(leaves.values()), g.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": t for name, t in zip(leaves, found, strict=True)}}


def widened(run: Run) -> Run:
    return run._replace(**{name: t.double() for name in NAMES if isinstance(t := getattr(run, name), Tensor)})


def check(case: Case, device: str, layout: Callable[[Tensor], Tensor] = lambda g: g) -> None:
    x, run = case.run(device)
    g = layout(torch.randn(case.M, case.d).to(device, case.dtype))
    ours, eager = fused(case, x, run, g), by_layers(case, x, run, g)
    truth = by_layers(case, x.double(), widened(run), g.double())
    assert ours.keys() == truth.keys()
    most = max(case.drop_path, default=0.0)
    for name in truth:
        terms = max(1.0, case.M * case.d * case.L / truth[name].numel()) / (1 - most)
        rule_for(case.dtype, name).check(name, ours[name], eager[name], truth[name], terms)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


MEMORY: dict[str, dict[str, Any]] = {
    "keep": {},
    "keep-dz": {"sums_weight": False},
    "every-third": {"keep_every": 3},
    "every-third-dz": {"keep_every": 3, "sums_weight": False},
    "from-memory": {"BLOCK_K": 16, "sums_weight": False},
    "every-third-from-memory": {"BLOCK_K": 16, "keep_every": 3, "sums_weight": False},
}
on_every_memory = pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)


@on_every_dtype
@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_order_and_skip(activation, order, has_skip, dtype, device):
    if activation == "relu" and dtype != torch.float32:
        pytest.skip("rounding a z near 0 turns relu's slope over: test_exact.py has relu in half precision")
    check(Case(dtype=dtype, activation=activation, order=order, has_skip=has_skip), device)


@on_every_memory
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("branch_scale", [1.0, -0.5, "layer", "channel"])
@pytest.mark.parametrize("skip_scale", [0.7, "layer"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_every_scale_and_memory_policy(order, skip_scale, branch_scale, bias, memory, device):
    check(Case(L=4, order=order, skip_scale=skip_scale, branch_scale=branch_scale, bias=bias, **memory), device)


@pytest.mark.parametrize("memory", ["keep", "every-third-dz", "from-memory"])
@on_every_dtype
@pytest.mark.parametrize(
    ("d", "L", "M"), [(1, 5, 19), (3, 2, 1), (17, 5, 83), (64, 5, 1), (100, 2, 19), (128, 1, 19), (250, 2, 19)]
)
def test_every_size(d, L, M, dtype, memory, device):
    """Up to six tiles of rows, three to a program."""
    check(Case(d, L, M, dtype, activation="tanh", **MEMORY[memory]), device)


@on_every_memory
@pytest.mark.parametrize("drop_path", [(0.4,), (0.0, 0.9, 0.3, 0.6)], ids=["one", "per-layer"])
@pytest.mark.parametrize(("order", "has_skip"), [("pre", True), ("post", True), ("pre", False)])
def test_stochastic_depth(order, has_skip, drop_path, memory, device):
    check(Case(L=4, M=35, order=order, has_skip=has_skip, drop_path=drop_path, **memory), device)


@pytest.mark.parametrize("memory", ["keep", "keep-dz", "from-memory"])
def test_a_tile_that_drops_all_its_rows_multiplies_nothing(memory, device):
    """Its dropped layer's weights are NaN, and reach neither its rows nor any gradient but g · 0."""
    case = Case(L=3, M=16, drop_path=(0.0, 1 - 2**-20, 0.0), **MEMORY[memory])
    x, run = case.run(device)
    g = torch.randn(16, 17, device=device)
    broken = run._replace(weight=run.weight.clone())
    broken.weight[1] = float("nan")
    expected, ours = fused(case, x, run, g), fused(case, x, broken, g)
    same(ours, expected)
    assert ours["y"].isfinite().all()
    assert ours["dweight"][1].abs().sum() == ours["dbias"][1].abs().sum() == ours["dbranch_scale"][1].abs().sum() == 0


@pytest.mark.parametrize("keep_every", [1, 2])
@pytest.mark.parametrize("layout", ["expanded", "transposed", "one-column-expanded"])
def test_every_layout_of_the_incoming_gradient(layout, keep_every, device):
    laid_out = {
        "expanded": lambda g: g[0, 0].expand_as(g),
        "one-column-expanded": lambda g: g[:, :1].expand_as(g),
        "transposed": transposed,
    }[layout]
    check(Case(keep_every=keep_every), device, laid_out)


@pytest.mark.parametrize("memory", ["keep", "from-memory"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_every_layout_of_rows(layout, memory, device):
    case = Case(**MEMORY[memory])
    x, run = case.run(device)
    x = x[:1].expand(19, 17) if layout == "expanded" else x
    wide = torch.cat([x, x], 1)[:, :17]
    given = {"transposed": transposed(x), "sliced": wide, "expanded": x}[layout]
    assert given.stride() != (17, 1)
    g = torch.randn(19, 17, device=device)
    same(fused(case, given, run, g), fused(case, x.contiguous(), run, g))


@pytest.mark.parametrize("d", [16, 17])
@pytest.mark.parametrize("memory", ["keep", "every-third", "from-memory"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_nan_stays_in_its_row(order, value, memory, d, device):
    case = Case(d=d, L=4, M=37, order=order, **MEMORY[memory])
    x, run = case.run(device)
    x[7, 3] = value
    found = fused(case, x, run, torch.ones_like(x))
    others = torch.arange(37, device=device) != 7
    for name in ("y", "dx"):
        assert not found[name][7].isfinite().all()
        assert found[name][others].isfinite().all()


def test_infinity_meets_no_padding(device):
    """relu hands infinity on: 0 · ∞ in a padded column would make NaN of the row's every other."""
    x = torch.tensor([[float("inf"), 1.0, 1.0]], device=device)
    run = Run(torch.ones(3, 3, 3, device=device), activation="relu", has_skip=False)
    y, _ = stack.forward(x, run, SMALL, "ieee", None)
    assert y.isinf().all()


def test_unwritten_rows_reach_no_product(device):
    """Rows outside M have z = b, whose φ may be infinite: sums over rows must not see it."""
    case = Case(M=3, activation="none", branch_scale="layer")
    x, run = case.run(device)
    run = run._replace(bias=torch.full_like(run.bias, 1e30))
    found = fused(case, x * 0, run, torch.randn_like(x))
    assert all(t.isfinite().all() for name, t in found.items() if name != "y")


@pytest.mark.parametrize(("order", "drop_path"), [("pre", (0.3,)), ("post", ())])
@on_every_dtype
def test_what_is_recomputed_has_the_bits_of_what_was_kept(dtype, order, drop_path, device):
    case = Case(L=5, M=35, dtype=dtype, order=order, drop_path=drop_path)
    x, run = case.run(device)
    g = torch.randn(35, 17).to(device, dtype)
    kept = fused(case, x, run, g)
    for keep_every in (3, 5):
        same(fused(replace(case, keep_every=keep_every), x, run, g), kept)
    for memory in ("keep-dz", "from-memory"):
        dz = replace(case, **MEMORY[memory])
        same(fused(replace(dz, keep_every=3), x, run, g), fused(dz, x, run, g))


@pytest.mark.parametrize("BLOCK_K", [0, 16])
def test_two_runs_give_the_same_bits(BLOCK_K, device):
    case = Case(L=3, M=51, d=40, drop_path=(0.3,), keep_every=2, sums_weight=BLOCK_K == 0, BLOCK_K=BLOCK_K)
    x, run = case.run(device)
    g = torch.randn(51, 40, device=device)
    same(fused(case, x, run, g), fused(case, x, run, g))


@pytest.mark.parametrize("BLOCK_K", [0, 16])
def test_a_row_has_the_same_bits_in_any_batch(BLOCK_K, device):
    case = Case(L=4, M=83, d=40, BLOCK_K=BLOCK_K)
    x, run = case.run(device)
    whole, _ = stack.forward(x, run, case.tile, "ieee", None)
    for M in (1, 16, 35):
        part, _ = stack.forward(x[:M], run, case.tile, "ieee", None)
        assert torch.equal(part, whole[:M])


@on_every_dtype
@pytest.mark.parametrize("BLOCK_K", [0, 16])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_run_is_its_layers_one_after_another(order, BLOCK_K, dtype, device):
    """Bit for bit, where the layer kernel takes as much of a product's depth at a time."""
    case = Case(d=32, dtype=dtype, order=order, branch_scale=0.5, skip_scale=0.75, BLOCK_K=BLOCK_K)
    x, run = case.run(device)
    y, kept = stack.forward(x, run, case.tile, "ieee", 1)
    spec = LayerSpec("gelu", order, "identity", skip_scale=0.75, branch_scale=0.5)
    h = x
    for i in range(case.L):
        operands = Operands(h, run.weight[i], run.bias[i])
        h, _, _ = layer.forward(operands, spec, dtype, Tile(16, 32, BLOCK_K or 32, 4, 2), "ieee", False, False)
        assert torch.equal(h, y if i == case.L - 1 else kept[i])


@pytest.mark.parametrize("BLOCK_K", [0, 16])
def test_only_what_is_wanted_is_computed(BLOCK_K, device):
    case = Case(L=4, sums_weight=False, BLOCK_K=BLOCK_K)
    x, run = case.run(device)
    g = torch.randn_like(x)
    tiles = StackTiles(case.tile, case.tile)
    for keep_every in (1, 2):
        _, kept = stack.forward(x, run, case.tile, "ieee", keep_every)
        every = fused(replace(case, keep_every=keep_every), x, run, g)
        for name in ("x", *NAMES):
            wanted = Wanted(*(field == name for field in Wanted._fields))
            found = stack_backward.backward(g, x, kept, run, wanted, tiles, "ieee", keep_every, 2, False)
            assert [field for field, t in found._asdict().items() if t is not None] == [name]
            assert torch.equal(getattr(found, name), every[f"d{name}"])


@pytest.mark.parametrize("far", ["x", "kept"])
def test_offsets_beyond_32_bits(far, device, monkeypatch):
    """Rows 2³⁰ elements apart, and h_2 2³¹ elements behind x: untouched pages cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    run = Run(torch.randn(3, 16, 16, device=device, dtype=torch.float16) / 4)
    if far == "x":
        stride = 2**30 + 8
        x = torch.empty(2 * stride + 16, dtype=torch.float16, device=device).as_strided((3, 16), (stride, 1))
        x.copy_(torch.randn(3, 16))
        near, _ = stack.forward(x.contiguous(), run, SMALL, "ieee", None)
        assert torch.equal(stack.forward(x, run, SMALL, "ieee", None)[0], near)
        return

    # one program alone, of the many that so many rows ask for
    kernel = stack._forward_kernel
    first = type("First", (), {"__getitem__": lambda self, grid: kernel[(1,)]})()
    M = 2**27 + 16
    row = torch.randn(1, 16).to(device, torch.float16)
    _, near = stack.forward(row.expand(16, 16), run, SMALL, "ieee", 1)
    monkeypatch.setattr(stack, "_forward_kernel", first)
    _, kept = stack.forward(row.expand(M, 16), run, SMALL, "ieee", 1)
    assert torch.equal(kept[:, :16], near)


@pytest.mark.parametrize("generation", ["ampere", "hopper", "blackwell", "hip"])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee")])
def test_every_width_and_dtype_has_tiles(dtype, precision, generation):
    def tiles(d: int, is_skinny: bool = False) -> StackTiles | None:
        return dispatch.stack_tiles(d, getattr(torch, dtype), precision, generation, is_skinny)

    assert all(tiles(d) for d in (1, 16, 17, 64, 65, 128, 129, 256))
    assert tiles(257) is None
    assert all(tile.BLOCK_M == 16 for d in (17, 200) for tile in tiles(d, is_skinny=True))
    assert tiles(17).backward.BLOCK_K == 0 < tiles(200).backward.BLOCK_K


def test_wide_runs_are_for_few_rows():
    assert dispatch.stack_pays(1 << 30, 128)
    assert dispatch.stack_pays(4096, 256)
    assert not dispatch.stack_pays(4097, 129)


def test_what_a_run_keeps_and_how_its_sums_are_shared():
    assert dispatch.stack_keeps(64, 1024, 64, torch.float32, recompute=False) == 1
    assert dispatch.stack_keeps(64, 1024, 64, torch.float32, recompute=True) == 8
    assert [dispatch.stack_keeps(L, 1, 1, torch.float32, recompute=True) for L in (1, 2, 5, 9, 10)] == [1, 2, 3, 3, 4]
    assert dispatch.stack_keeps(2, 2**20, 128, torch.float32, recompute="auto") == 1
    assert dispatch.stack_keeps(5, 2**20, 128, torch.float32, recompute="auto") == 3
    assert dispatch.stack_sums_weight(200, 32, 132)
    assert not dispatch.stack_sums_weight(1000, 32, 132)
    assert not dispatch.stack_sums_weight(2, 33, 132)
    tile = StackTile(64, 8, 2)
    assert dispatch.stack_programs(100, 32, 64, tile, True, 132) == 2
    assert dispatch.stack_programs(65536, 32, 64, tile, True, 132) == 264
    assert dispatch.stack_programs(65536, 100, 64, tile, True, 132) == 156  # what 256 MiB of partial sums allow


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_the_bytes_that_are_stated_are_those_that_move(memory, device, monkeypatch):
    """Counted where the interpreter loads and stores tiles: rows in fp16, dw's sums in fp32."""
    if device != "cpu":
        pytest.skip("a GPU counts nothing for us")
    interpreter = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    moved: Counter = Counter()

    def counting(name: str) -> None:
        call = getattr(interpreter, name)

        def counted(pointers: Any, *arguments: Any) -> Any:
            mask = arguments[0] if name == "create_masked_load" else arguments[1]
            kind = {(tile.BLOCK_M, 32): "rows", (tile.BLOCK_M, 16): "part", (32, 32): "square"}.get(pointers.data.shape)
            moved[kind, pointers.get_element_ty().primitive_bitwidth // 8] += int(mask.data.sum())
            return call(pointers, *arguments)

        monkeypatch.setattr(interpreter, name, counted)

    counting("create_masked_load")
    counting("create_masked_store")
    case = Case(d=30, L=5, M=35, dtype=torch.float16, **memory)
    tile = case.tile._replace(BLOCK_M=64) if case.BLOCK_K else case.tile  # to be told from parts of weights
    x, run = case.run(device)
    y, kept = stack.forward(x, run, tile, "ieee", case.keep_every)
    size = (case.M, case.d, case.L, 2)
    stated = stack_bytes.forward(*size, case.keep_every, case.BLOCK_K > 0)
    assert 2 * (moved["rows", 2] + moved["part", 2]) == stated.rows + stated.cached

    moved.clear()
    tiles = StackTiles(tile, tile)
    stack_backward.backward(
        y, x, kept, run, everything(run), tiles, "ieee", case.keep_every, case.programs, case.sums_weight
    )
    stated = stack_bytes.backward(*size, case.keep_every, case.sums_weight, tile)
    assert 2 * (moved["rows", 2] + moved["part", 2]) + 4 * moved["rows", 4] == stated.rows + stated.cached
    left_to_torch = case.programs * case.L * case.d**2 * 4 if case.sums_weight else 0
    assert 4 * moved["square", 4] + left_to_torch == stated.sums
