"""The predictions' arithmetic by hand; their file and table are what the command gives; a measured run beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import issued
import predict
import prediction
import pytest
from layer_bytes import Kernel
from prediction import Count, Time

triton = pytest.importorskip("triton")
RECORD = json.loads(predict.FILE.read_text())
COUNTS = predict.read_counts(RECORD)
STALE = "run python bench/predict.py --write"


def test_the_file_is_what_the_command_gives():
    assert {k: v for k, v in RECORD.items() if k not in ("commit", "date", "triton")} == predict.record(COUNTS), STALE
    assert RECORD["what"] == "predicted, not measured"
    assert all(row["what"] == RECORD["what"] for row in RECORD["rows"].values())


def test_the_table_is_what_the_command_gives():
    text = predict.README.read_text()
    assert text == predict.replaced(text, RECORD["rows"]), STALE
    with pytest.raises(ValueError, match="must have one line"):
        predict.replaced("", RECORD["rows"])


def test_it_counts_what_it_predicts_and_no_more():
    names = set()
    for d in predict.WIDTHS:
        for kind in ("F", "FB"):
            plan, keeps, kernels = predict.ours(d, kind)
            names |= {prediction.key(kernel, plan, keeps, d) for kernel in kernels if kernel.issues}
    assert names == set(COUNTS), STALE
    with pytest.raises(ValueError, match="there is no count for persistent 64 64 64 64 4 4 1 8 4: run"):
        predict.prediction(64, "F", {})


def test_a_row_by_hand():
    """d = 1024, forward: a product of 137.4 GFLOP at 620 TFLOP/s hides 2 passes of 134.2 MB and what finishes."""
    row = RECORD["rows"]["cuda-layer-d1024-m65536-bf16-F"]
    product, a_pass = 2 * 65536 * 1024**2 / 620e6, 65536 * 1024 * 2 / 3.0e6
    us = row["predicted_us"]
    assert us["fused"] == pytest.approx(product + 2, rel=1e-3)
    assert us["compile"] == pytest.approx(product + 3 * a_pass + 2 * 2, rel=1e-3)
    assert us["eager"] == pytest.approx(product + 5 * a_pass + 3 * 2, rel=1e-3)
    assert us["matmul"] == us["fused"]
    by_compile, _, by_matmul = row["targets"]
    assert by_compile["predicted"] == pytest.approx(us["compile"] / us["fused"], rel=1e-3)
    assert by_compile["margin"] == pytest.approx(us["compile"] / us["fused"] / 1.45 - 1, abs=1e-3)
    assert by_matmul["margin"] == pytest.approx(0.15, abs=1e-3)


def test_instructions_by_hand():
    """d = 4096 in tiles of 128 × 256: 8192 of them, 64 steps in each; one program, so that finishing follows."""
    d, (plan, keeps, kernels) = 4096, predict.ours(4096, "F")
    rate = 132 * 128 * 1755
    count = Count(per_tile=1000, per_step=[10], threads=256, residents=1)
    finishing, hidden, residents = prediction.instructions_us(kernels[0], plan, keeps, d, count)
    assert (finishing, hidden, residents) == (
        pytest.approx(8192 * 1000 * 256 / rate),
        pytest.approx(8192 * 640 * 256 / rate),
        1,
    )
    product = kernels[0].flops / 620e6
    name = kernels[0].name
    assert prediction.time_of(kernels[0], 1.0, (finishing, hidden, 1)) == Time(
        name, pytest.approx(product + finishing + 2), pytest.approx(product + 2)
    )
    assert prediction.time_of(kernels[0], 1.0, (finishing, hidden, 2)).us == pytest.approx(product + 2)
    assert prediction.time_of(kernels[0], 5000.0, (finishing, hidden, 1)).us == 5002.0


def test_dz_inside_is_written_by_the_first_columns_alone():
    """d = 1024 in tiles of 128 × 256, 32 steps: one in four takes 300 instructions, the others 200."""
    plan, keeps, kernels = predict.ours(1024, "FB")
    inside = next(kernel for kernel in kernels if kernel.issues == "inside")
    finishing, hidden, _ = prediction.instructions_us(inside, plan, keeps, 1024, Count(100, [300, 200], 256, 1))
    assert finishing == pytest.approx(2048 * (100 + 32 * 225) * 256 / (132 * 128 * 1755))
    assert hidden == 0


def test_what_was_touched_last_comes_out_of_the_cache():
    cache, memory, near = prediction.Cache(), 10e6 / 3.0e6, 10e6 / 5.5e6
    kernel = Kernel("one", {"x": 10_000_000}, {"z": 10_000_000})
    assert prediction.moving_us(kernel, cache) == pytest.approx(2 * memory)
    assert prediction.moving_us(kernel, cache) == pytest.approx(near + memory)
    assert prediction.moving_us(Kernel("two", {"g": 20_000_000}, {}), cache) == pytest.approx(2 * memory)
    assert cache.read_us("z", 10_000_000) == pytest.approx(near)
    assert cache.read_us("x", 10_000_000) == pytest.approx(memory)


@pytest.mark.parametrize(
    ("name", "bar", "ratio", "overlapped", "verdict", "margin"),
    [
        ("compile / fused", 1.5, 1.5, 1.6, "met", 0.0),
        ("compile / fused", 1.5, 1.2, 1.6, "missed, unless finishing overlaps", -0.2),
        ("compile / fused", 1.5, 1.2, 1.4, "missed", -0.2),
        ("fused / matmul", 1.1, 1.0, 1.0, "met", 0.1),
        ("fused / matmul", 1.1, 1.375, 1.2, "missed", -0.2),
    ],
)
def test_verdicts(name, bar, ratio, overlapped, verdict, margin):
    found = predict.target(name, bar, ratio, overlapped)
    assert (found["verdict"], found["margin"]) == (verdict, pytest.approx(margin, abs=1e-4))


def test_a_measured_run_beside_them(tmp_path, monkeypatch, capsys):
    rows = RECORD["rows"]
    name = "cuda-layer-d1024-m65536-bf16-F"
    us = rows[name]["predicted_us"]
    ms = {"eager": us["eager"], "compile": 3000, "compile-autotuned": 300, "fused": 2 * us["fused"]}
    cold = {way: {"median": t / 1e3} for way, t in ms.items()}
    measured = {"kind": "contest", "rows": {name: {"headline": "cold", "device_milliseconds": {"cold": cold}}}}
    (tmp_path / "layer.json").write_text(json.dumps(measured))
    monkeypatch.setattr(sys, "argv", ["predict.py", "--against", str(tmp_path / "layer.json")])
    predict.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"{name} fused µs 224 447 2.00" in lines
    assert f"{name} compile µs 360 300 0.83" in lines
    assert f"{name} matmul µs 224 - -" in lines
    assert f"{name} compile / fused ≥ 1.45 1.61 0.67 0.42 predicted met, measured missed" in lines
    assert f"{name} eager / fused ≥ 0.98 2.02 1.01 0.50 predicted met, measured met" in lines
    assert f"{name} fused / matmul ≤ 1.15 1.00 - - predicted met" in lines
    assert "cuda-layer-d64-m65536-bf16-F fused µs 7.59 - -" in lines
    with pytest.raises(ValueError, match="must be of kind contest, got None"):
        predict.against(rows, {})


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   FMUL R2, R2, R3 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R1 ;
        /*0090*/              @!P1 BRA `(.L_x_4) ;
        /*00a0*/                   BRA `(.L_x_3) ;
"""


def test_loops_in_the_machine_code():
    """The loop over tiles has 6 instructions, of which 3 are a loop's; waits behind the end are no loops."""
    assert issued.by_loops(SASS) == (3, [3])
    assert issued.by_loops(SASS.replace("@P0 BRA", "@P0 NOP")) == (6, [])
    assert issued.by_loops(SASS.replace("@P0 BRA", "@P0 NOP").replace("@P2 BRA", "@P2 NOP")) == (8, [])


@pytest.mark.slow
def test_the_counts_are_those_of_the_kernels():
    if triton.__version__ != RECORD["triton"]:
        pytest.skip(f"counted with triton {RECORD['triton']}, this is {triton.__version__}")
    code = "import json, predict; print(json.dumps({k: c._asdict() for k, c in predict.counted().items()}))"
    path = os.pathsep.join((str(predict.ROOT), str(predict.ROOT / "bench")))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == RECORD["instructions"], STALE
