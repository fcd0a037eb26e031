"""Which kernels run a layer: known of shapes, dtypes and memory alone, so that a machine without a GPU can ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from fusedres import (
    FusedResidualLinear,
    assembler,
    batch_invariant,
    dispatch,
    explain,
    explanation,
    measured,
    ops,
    plans,
)
from fusedres.dispatch import Triton
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
from fusedres.kernels.spec import LayerSpec, Operands

H100 = Triton("", "cuda", 90, "NVIDIA H100 80GB HBM3")
A100 = Triton("", "cuda", 80, "NVIDIA A100")
B200 = Triton("", "cuda", 100, "NVIDIA B200")
RTX5090 = Triton("", "cuda", 120, "NVIDIA GeForce RTX 5090")
HALF = torch.bfloat16


def operands_of(M: int, N: int, K: int, dtype: torch.dtype = HALF, **others: torch.Tensor) -> Operands:
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K)))
    return Operands(x, weight, **others)


def plan_for(
    M: int, N: int, K: int, dtype: torch.dtype = HALF, choice: Triton = H100, operands: Operands | None = None, **spec
) -> Plan:
    return plans.layer_plan(operands or operands_of(M, N, K, dtype), LayerSpec(**spec), choice, dtype)


def because_of(M: int, N: int, K: int, dtype: torch.dtype = HALF, choice: Triton = H100, **spec) -> plans.Because:
    return plans.explained(operands_of(M, N, K, dtype), LayerSpec(**spec), choice, dtype)[1]


@pytest.fixture(autouse=True)
def _forgotten():
    """What a test has measured, or set, is not there for the next."""
    yield
    forget()


def forget() -> None:
    measured._plans.cache_clear()
    HAS_EAGER.cache_clear()
    plans.forget()


# ------------------------------------------------------------------------------------------------ never of M


@pytest.mark.parametrize("choice", [H100, A100, B200], ids=["sm_90", "sm_80", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", ["identity", "projection"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 64), (67, 129), (512, 512), (4096, 1024)])
def test_plans_know_two_classes_of_rows(N, K, skip, dtype, choice):
    def of(rows, **options):
        return {plan_for(M, N, K, dtype, choice, skip=skip, **options) for M in rows}

    few, many = [1, 2, 7, 63, 64], [65, 100, 1000, 65536, 2**31]
    assert len(of(few)) == len(of(many)) == 1
    assert of(few) != of(many)
    for_all, (for_many,) = of(few + many, batch_invariant=True), of(many)
    assert len(for_all) == 1, "one class for all"
    by_library = isinstance(for_many.forward, Elementwise) or getattr(for_many.backward, "dx", "kernel") is None
    assert by_library or for_all == {for_many}, "that of many rows"


def test_plans_count_all_leading_dimensions():
    x, weight = torch.empty(8, 16, 6, device="meta"), torch.empty(6, 6, device="meta")
    found = plans.layer_plan(Operands(x, weight), LayerSpec(), H100, torch.float32)
    assert found == plan_for(128, 6, 6, torch.float32)


# ------------------------------------------------------------------------------------------------ which form


def test_narrow_layers_go_backward_in_one_kernel():
    for skip in ("none", "identity", "residual"):
        assert isinstance(plan_for(4096, 128, 128, skip=skip).backward, Together)
    assert isinstance(plan_for(4096, 128, 128, choice=A100).backward, Together)
    for skip in ("projection", "concat"):
        assert isinstance(plan_for(4096, 128, 128, skip=skip).backward, Separate)
    assert isinstance(plan_for(4096, 129, 128).backward, Separate)


def test_what_the_copy_engine_is_for():
    for N, K in ((64, 64), (256, 256), (512, 264), (4096, 4096)):
        plan = plan_for(4096, N, K)
        assert isinstance(plan.forward, PersistentTile)
        assert isinstance(plan.training, PersistentTile)
        assert isinstance(plan_for(4096, N, K, choice=A100).forward, Tile), "older chips have none"
        assert isinstance(plan_for(64, N, K).forward, Tile), "few rows"
        assert isinstance(plan_for(4096, N + 1, K).forward, Tile), "rows that are no multiple of 16 bytes"
        assert isinstance(plan_for(4096, N, K, skip="projection").forward, Tile)
    assert isinstance(plan_for(4096, 512, 512).backward, Inside)
    assert isinstance(plan_for(4096, 512, 512, recompute=True).backward, Separate), "z is multiplied again"


@pytest.mark.parametrize("mode", [(torch.float32, "ieee"), (torch.float32, "tf32"), (HALF, "ieee")], ids=str)
def test_chips_with_little_shared_memory_have_the_tiles_of_older_ones(mode, monkeypatch):
    """12.x comes after 9.0 and 10.0, and has what 8.x has."""
    dtype, precision = mode
    monkeypatch.setattr(plans, "precision", lambda dtype: precision)
    for N, skip in ((16, "identity"), (64, "identity"), (128, "residual"), (256, "projection"), (1024, "identity")):
        for M in (8, 4096):
            expected = plan_for(M, N, N, dtype, A100, skip=skip)
            assert plan_for(M, N, N, dtype, RTX5090, skip=skip) == expected
    for capability, generation in ((86, "ampere"), (89, "ampere"), (90, "hopper"), (103, "blackwell"), (121, "ampere")):
        assert Triton("", "cuda", capability).generation == generation
    assert Triton("", "hip", 0).generation == "hip"


def test_layers_that_do_more_to_each_number_have_a_lower_tile():
    busy = operands_of(4096, 512, 512, skip_scale=torch.ones((), device="meta"))
    assert plan_for(0, 512, 512, operands=busy).backward == plans.INSIDE_BUSY
    assert plan_for(4096, 512, 512, order="post").backward == plans.INSIDE_BUSY
    assert plan_for(4096, 512, 512, drop_path=0.5).backward == plans.INSIDE_BUSY
    assert plan_for(4096, 512, 512).backward == plans.INSIDE


def test_where_operands_lie_decides():
    wide = torch.empty(4096, 1024, dtype=HALF)
    weight = torch.empty(512, 512, dtype=HALF)

    def form(x: torch.Tensor, weight: torch.Tensor = weight, **others: torch.Tensor) -> type:
        return type(plan_for(0, 512, 512, operands=Operands(x, weight, **others), skip="residual").forward)

    assert form(wide[:, :512]) is form(wide[:, 8:520]) is PersistentTile
    assert form(wide[:, 1:513]) is Tile
    assert form(wide[:, ::2]) is Tile
    assert form(wide[:1, :512].expand(4096, -1)) is Tile
    assert form(wide[:, :512], weight.t()) is Tile
    assert form(wide[:, :512], residual=wide[:, 1:513]) is Tile
    assert form(wide[:, :512], residual=wide[:, :512].float()) is Tile, "of another dtype, under autocast"
    plan = plans.layer_plan(operands_of(4096, 512, 512), LayerSpec(), H100, HALF, torch.empty(4096, 512, device="meta"))
    assert isinstance(plan.backward, Separate), "g of another dtype"


def test_exact_fp32_multiplies_by_the_library_where_products_are_large():
    plan = plan_for(4096, 512, 512, torch.float32)
    assert isinstance(plan.forward, Elementwise)
    assert plan.backward == Separate(plan.backward.dz, None)
    assert isinstance(plan_for(4096, 512, 512, torch.float32, skip="concat").forward, Tile)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert isinstance(plan_for(4096, 512, 512, torch.float32).forward, Tile), "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_library_is_left_out_where_bits_may_not_depend_on_the_batch(on_file):
    for dtype, width in ((torch.float32, 512), (HALF, 2048)):
        plan = plan_for(4096, width, width, dtype, batch_invariant=True)
        assert not isinstance(plan.forward, Elementwise)
        assert isinstance(plan.backward.dx, Tile)
        assert plan_for(4096, width, width, dtype).backward.dx is None
    on_file(MEASURED._replace(forward=Elementwise(16, 64, 4)), 512)
    plan = plan_for(4096, 512, 512, batch_invariant=True)
    assert isinstance(plan.forward, PersistentTile)
    assert isinstance(plan.backward, Inside), "the measured one has dx by the library"


def test_every_part_has_its_reason():
    """That of the form it is of, and of what stood in the way of a better one."""
    wary = Triton("", "cuda", 90, H100.gpu, trusts_registers=False)
    for part, words, because in (
        ("forward", "shared memory", because_of(4096, 64, 64)),
        ("forward", "finishes a tile while", because_of(4096, 512, 512)),
        ("forward", "larger tiles read less", because_of(4096, 4096, 4096)),
        ("forward", "read w rather than x", because_of(64, 512, 512)),
        ("forward", "copies no tiles by descriptors", because_of(4096, 512, 512, choice=A100)),
        ("forward", "multiples of 16 bytes", because_of(4096, 513, 512)),
        ("forward", "laid out for 16 bits", because_of(4096, 64, 64, torch.float32)),
        ("forward", "no matrix unit", because_of(4096, 512, 512, torch.float32)),
        ("backward", "in its registers", because_of(4096, 64, 64)),
        ("weight", "sums dw itself", because_of(4096, 64, 64)),
        ("backward", "where dx reads it", because_of(4096, 512, 512)),
        ("backward", "has not passed the sweep", because_of(4096, 512, 512, choice=wary)),
        ("backward", "a kernel of its own", because_of(4096, 512, 512, recompute=True)),
        ("backward", "this is a concat", because_of(4096, 512, 512, skip="concat")),
        ("backward", "would make dz again", because_of(4096, 4096, 4096)),
        ("backward", "depend on the batch", because_of(4096, 4096, 4096, batch_invariant=True)),
        ("weight", "hard to beat", because_of(4096, 512, 512)),
    ):
        reason = getattr(because, part)
        assert reason.startswith("reasoned, not measured: ")
        assert words in reason, (part, words, reason)


def test_what_forward_keeps_is_known_without_memory():
    for N, skip, alone in ((128, "identity", True), (129, "identity", False), (128, "concat", False)):
        given = operands_of(4096, N, 128)
        assert plans.keeps_input_alone(given, LayerSpec(skip=skip), H100) is alone
        assert isinstance(plan_for(4096, N, 128, skip=skip).backward, Together) is alone


# ------------------------------------------------------------------------------------------------ which assembler


def test_products_out_of_registers_want_an_assembler_that_is_trusted(tmp_path, monkeypatch):
    """On Hopper: ptxas 13.3, or a sweep of that GPU with the older one."""
    gpu = H100.gpu
    monkeypatch.setattr(assembler, "SWEPT", tmp_path / "swept.json")
    assembler._swept.cache_clear()
    assert not assembler.trusts_register_operands(gpu, 90, "12.8")
    assert not assembler.trusts_register_operands(gpu, 90, "13.2")
    assert not assembler.trusts_register_operands(gpu, 90, "unknown")
    assert assembler.trusts_register_operands(gpu, 90, "13.3")
    assert assembler.trusts_register_operands(gpu, 90, "14.0")
    assert assembler.trusts_register_operands(gpu, 80, "12.8")
    assert assembler.trusts_register_operands(gpu, 100, "12.8")
    assembler.SWEPT.write_text(json.dumps({"sweeps": [{"gpu": gpu, "ptxas": "12.8"}]}))
    assembler._swept.cache_clear()
    assert assembler.trusts_register_operands(gpu, 90, "12.8")
    assert not assembler.trusts_register_operands("another", 90, "12.8")
    assembler._swept.cache_clear()


def test_without_trust_no_operand_is_in_registers():
    wary = Triton("", "cuda", 90, H100.gpu, trusts_registers=False)
    assert isinstance(plan_for(4096, 512, 512, choice=wary).backward, Separate)
    assert isinstance(plan_for(4096, 512, 512, choice=wary).forward, PersistentTile)
    tiles = dispatch.stack_tiles(64, HALF, "ieee", "hopper", False, trusts_registers=False)
    assert max(tile.BLOCK_M for tile in tiles) <= 32, "fewer rows than Hopper's asynchronous products take"
    assert max(tile.BLOCK_M for tile in dispatch.stack_tiles(64, HALF, "ieee", "hopper", False)) > 32


# ------------------------------------------------------------------------------------------------ measured


MEASURED = Plan(
    PersistentTile(64, 128, 64, 4, 2, 2, 4, 3),
    Tile(32, 32, 32, 4, 2),
    Separate(Tile(16, 32, 32, 4, 2), None),
    SplitTile(64, 64, 64, 4, 3, 8, True),
)


HAS_EAGER = measured.has_eager


@pytest.fixture
def on_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(plan: Plan, N: int, mode: str = "bf16", eager: dict[str, str] | None = None) -> None:
        row = {"N": N, "K": N, "mode": mode, "is_skinny": False, "plan": measured.encoded(plan), "eager": eager or {}}
        record = {"gpu": H100.gpu, "date": "2026-01-02", "layers": [row]}
        measured.file(H100.gpu).write_text(json.dumps(record))
        forget()

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(measured, "has_eager", HAS_EAGER)
    return write


def test_measured_plans_come_first(on_file):
    on_file(MEASURED, 512)
    assert measured.file(H100.gpu).name == "nvidia-h100-80gb-hbm3.json"
    assert plan_for(4096, 512, 512) == MEASURED
    assert plan_for(4096, 512, 512, skip="residual") == MEASURED
    assert plan_for(4096, 1024, 1024) != MEASURED, "of another size"
    assert plan_for(4096, 512, 512, torch.float16) != MEASURED, "of another dtype"
    assert plan_for(64, 512, 512) != MEASURED, "of another class of rows"
    assert plan_for(4096, 512, 512, choice=A100) != MEASURED, "of another chip"
    assert plan_for(300, 512, 512).weight.splits == 3, "as many shares as there are two steps for"


def test_measured_forms_that_do_not_fit_are_not_taken(on_file):
    on_file(MEASURED, 512)
    plan = plan_for(4096, 512, 512, skip="projection")
    assert isinstance(plan.forward, Tile), "descriptors take no projection"
    because = because_of(4096, 512, 512, skip="projection")
    assert because.weight == f"measured on {H100.gpu}, 2026-01-02"
    assert because.forward.endswith("descriptors are for a skip of one matrix of y's shape, and this is a projection")
    transposed = Operands(torch.empty(4096, 512, dtype=HALF), torch.empty(512, 512, dtype=HALF).t())
    plan = plan_for(0, 512, 512, operands=transposed)
    assert isinstance(plan.forward, Tile)
    assert plan.weight is None, "its descriptors"
    on_file(MEASURED._replace(backward=Inside(PersistentTile(64, 64, 32, 4, 2))), 512)
    assert isinstance(plan_for(4096, 512, 512).backward, Inside)
    assert isinstance(plan_for(4096, 512, 512, recompute=True).backward, Separate)
    busy = operands_of(4096, 512, 512, skip_scale=torch.ones((), device="meta"))
    assert plan_for(0, 512, 512, operands=busy).backward == plans.INSIDE_BUSY, "the tile was measured on a plain layer"


def test_a_narrow_layer_measured_faster_in_pieces_keeps_what_these_read(on_file):
    given = operands_of(4096, 128, 128)
    on_file(MEASURED, 128)
    assert plan_for(4096, 128, 128) == MEASURED
    assert not plans.keeps_input_alone(given, LayerSpec(), H100)
    assert isinstance(plan_for(32, 128, 128).backward, Separate), "few rows too: forward has kept φ' for it"
    on_file(MEASURED._replace(backward=Together(StackTile(64, 8, 2))), 128)
    assert plan_for(4096, 128, 128).backward == Together(StackTile(64, 8, 2))
    assert plans.keeps_input_alone(given, LayerSpec(), H100)


def test_eager_is_taken_where_it_was_measured_faster(on_file, monkeypatch):
    """As a call or as a step of training, of plain layers alone, and never while a batch may not matter."""
    monkeypatch.setattr(dispatch, "backend", lambda device, dtype: H100)
    monkeypatch.setattr(ops, "residual_linear", lambda operands, spec: operands.x)  # there is no GPU to run it
    on_file(MEASURED, 16, eager={"forward": "1 ms by eager PyTorch, 2 fused"})
    layer, x = FusedResidualLinear(16).to(HALF), torch.randn(80, 16, dtype=HALF)

    def backend(module: torch.nn.Module = layer, rows: torch.Tensor = x) -> str:
        calls: list[explanation.Call] = []
        with mock.patch.object(explanation, "_listener", calls):
            module(rows)
        return calls[0].backend

    with torch.no_grad():
        assert backend() == "eager"
        (call,) = explain(layer, x)
        assert call.choice.because == f"measured on {H100.gpu}, 2026-01-02: 1 ms by eager PyTorch, 2 fused"
        assert call.in_training == H100
        assert "in training: triton" in str(call)
        with batch_invariant():
            assert backend() == "triton"
        assert backend(rows=x[:64]) == "triton", "few rows were not"
        assert backend(FusedResidualLinear(16, learn_skip_scale=True).to(HALF)) == "triton"
        assert backend(FusedResidualLinear(16, drop_path=0.5).to(HALF)) == "triton"
        assert backend(FusedResidualLinear(16, order="post").to(HALF)) == "triton"
        assert backend(FusedResidualLinear(16, skip_scale=0.5).to(HALF)) == "triton"
        assert backend(FusedResidualLinear(16, branch_scale=0.5).to(HALF)) == "triton"
        assert backend(FusedResidualLinear(16, recompute=True).to(HALF)) == "triton"
        with dispatch.warming():
            assert backend() == "triton", "so that a graph may capture its kernels"
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert not dispatch.prefers_kernels(torch.device("cpu"))
            patched.setattr(plans, "prefers_kernels", lambda device: dispatch.prefers_kernels(torch.device("cuda")))
            assert backend() == "triton", "the host's time is not in a graph that warmup has made ready"
            patched.setattr(dispatch._Switches, "has_warmed", False)
            assert backend() == "eager", "what was never compiled cannot be captured"
        assert backend(FusedResidualLinear(16), x.float()) == "triton", "of another dtype"
        with torch.autocast("cpu", HALF):
            assert backend() == "triton"
    assert backend() == "triton", "a step of training was measured slower"
    on_file(MEASURED, 16, eager={"training": "1 ms by eager PyTorch, 2 fused"})
    assert backend() == "eager"
    with torch.no_grad():
        assert backend() == "triton"
    (call,) = explain(layer, x)
    assert call.backend == "triton"
    assert "    in training: eager, because measured on" in str(call)


def test_a_compiled_layer_is_the_operator_and_nothing_is_read(on_file, monkeypatch):
    """Though eager PyTorch was measured faster: a file cannot be read in what is traced."""
    on_file(MEASURED, 16, eager={"forward": "1 ms by eager PyTorch, 2 fused"})

    def choose(*_: object) -> Triton:
        return H100

    choose.__dict__["_dynamo_marked_constant"] = True  # as dispatch marks its own
    monkeypatch.setattr(dispatch, "_constant_backend", choose)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return lambda *given: (torch.empty(80, 16, dtype=HALF),)  # there is no GPU to run it

    layer, x = FusedResidualLinear(16).to(HALF), torch.randn(80, 16, dtype=HALF)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=keep)(x)
    torch._dynamo.reset()
    (graph,) = graphs
    assert any("residual_linear" in str(node.target) for node in graph.graph.nodes)


def test_plans_go_to_json_and_back():
    for plan in (MEASURED, plan_for(4096, 64, 64), plan_for(4096, 512, 512), plan_for(4096, 512, 512, torch.float32)):
        assert measured.decoded(json.loads(json.dumps(measured.encoded(plan)))) == plan


def test_tiles_that_are_committed_can_be_read():
    for path in measured.FOLDER.glob("*.json"):
        record = json.loads(path.read_text())
        if path == assembler.SWEPT:
            assert all({"gpu", "ptxas", "seeds", "commit"} <= sweep.keys() for sweep in record["sweeps"])
            continue
        assert path == measured.file(record["gpu"])
        assert {"torch", "triton", "ptxas", "date", "commit"} <= record.keys()
        assert measured._plans(record["gpu"])
