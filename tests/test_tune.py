"""`bench/tune.py`: candidates begin with the heuristic's choice, what spills or is wrong never wins, nor does noise."""

from __future__ import annotations

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import tune
from candidates import MOST, candidates, label
from configurations import MODES
from examine import Finding, Job, Workers, examined
from integers import HAS_GPU
from timing import Quartiles

from fusedres import dispatch, launch, measured, plans
from fusedres.dispatch import Triton
from fusedres.kernels.config import Elementwise, Plan, Separate, Tile, Together
from fusedres.kernels.spec import LayerSpec, Operands
from fusedres.kernels.triton import layer_library

WIDTHS = [N for N, _ in tune.SIZES]
WHOLE = ("whole forward", "whole training")
MODE = "bf16" if HAS_GPU else "fp16"  # the interpreter is wrong in bf16


def facts_of(width: int, mode: str = MODE, is_skinny: bool = False, capability: int = 90) -> plans.Facts:
    dtype, precision = MODES[mode]
    is_described = dispatch.generation_of("cuda", capability) in plans.DESCRIBING and width * dtype.itemsize % 16 == 0
    place = ("identity", "cuda", capability, "", is_skinny, False, is_described, True, "plain")
    return plans.Facts(width, width, dtype, precision, *place)


@pytest.fixture(autouse=True)
def _forgotten():
    """What a test has measured, and how products multiply, is not there for the next."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    measured._plans.cache_clear()
    plans.forget()


# ------------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("is_skinny", [False, True], ids=["many", "few"])
@pytest.mark.parametrize("mode", MODES)
def test_candidates_begin_with_the_heuristics_choice(mode, is_skinny, capability):
    for width in (16, 67, *WIDTHS):
        facts = facts_of(width, mode, is_skinny, capability)
        plan = plans.plan_of(facts)
        found = candidates(facts, 64 if is_skinny else 65536, 132)
        own = {"forward": plan.forward, "weight": plan.weight}
        is_one = isinstance(plan.backward, Together)
        own |= {"together": plan.backward} if is_one else {"training": plan.training, "backward": plan.backward}
        assert {part: found[part][0] for part in own} == own
        assert found.keys() == set(tune.PARTS) | ({"together"} if is_one else set())
        for part, forms in found.items():
            assert 2 <= len(forms) <= MOST
            assert len({label(form) for form in forms}) == len(forms)
            assert all(measured.decoded(measured.encoded(form)) == form for form in forms)
            assert not any(plans.why_not(facts, form) for form in forms) or (is_one and part == "backward")
            assert all(sizes_are_powers_of_two(form) for form in forms), forms


def sizes_are_powers_of_two(form: object) -> bool:
    if not isinstance(form, tuple):
        return True
    fields = form._asdict()
    sizes = [v for name, v in fields.items() if name.startswith("BLOCK_") or name == "warps"]
    return all(v == 0 or v & (v - 1) == 0 for v in sizes) and all(map(sizes_are_powers_of_two, fields.values()))


def test_every_layer_can_take_the_library_with_one_kernel_around_it():
    """So that nothing is slower than that."""
    for width, mode, is_skinny in product((64, 512, 8192), MODES, (False, True)):
        found = candidates(facts_of(width, mode, is_skinny), 64 if is_skinny else 65536, 132)
        for part in ("forward", "training"):
            assert any(isinstance(form, Elementwise) for form in found[part])
        assert any(isinstance(form, Separate) and form.dx is None for form in found["backward"])
        assert None in found["weight"]


def test_shares_fill_the_gpu_and_have_two_steps():
    for width, rows in product(WIDTHS, (65536, 64)):
        for form in candidates(facts_of(width), rows, 132)["weight"][1:]:
            tiles = -(-width // form.BLOCK_N) * -(-width // form.BLOCK_K)
            assert form.splits == 1 or tiles * form.splits <= 264
            assert form.splits == 1 or form.splits * 2 * form.BLOCK_M <= rows


# ------------------------------------------------------------------------------------------------ one candidate


def test_a_right_candidate_is_eligible():
    for part, forms in candidates(facts_of(32), 72, 3, most=1).items():
        assert examined(Job(part, forms[0], facts_of(32))) == Finding(), part


def test_each_part_is_what_it_is_called():
    facts = facts_of(32)
    subject = tune.Subject.of(facts, 8)
    got = {part: subject.call(part, forms[0])() for part, forms in candidates(facts, 8, 1).items()}
    assert got["forward"][1] is None
    assert got["training"][1].dtype == subject.kept.dtype
    assert got["backward"].x is not None
    assert got["backward"].bias is not None
    assert got["backward"].weight is None
    assert got["weight"].shape == got["together"].weight.shape == (32, 32)
    assert got["together"].x is not None
    assert got["together"].bias is not None


def test_spills_and_wrong_results_are_seen(monkeypatch):
    job = Job("forward", Elementwise(16, 32, 4), facts_of(32))
    kernel = layer_library._finish_kernel

    def put(launch):
        stub = type("Stub", (), {"__getitem__": lambda self, grid: launch(kernel[grid])})()
        monkeypatch.setattr(layer_library, "_finish_kernel", stub)

    def spills(launch):
        return lambda *args, **options: (launch(*args, **options), SimpleNamespace(n_spills=3))[1]

    put(spills)
    assert examined(job) == Finding("spills 12 bytes")
    put(lambda launch: lambda *args, **options: None)
    assert examined(job).is_wrong
    put(lambda launch: lambda *args, **options: 1 // 0)
    assert examined(job) == Finding("ZeroDivisionError: integer division or modulo by zero")


def test_jobs_of_a_process_that_dies_are_done_again_each_alone(monkeypatch):
    class Pool:
        def __init__(self, dies):
            self.dies = dies

        def submit(self, function, job):
            if self.dies(job) is None:
                raise BrokenProcessPool
            future = Future()
            dies = self.dies(job)
            future.set_exception(BrokenProcessPool()) if dies else future.set_result(Finding(f"of {job}"))
            return future

        def shutdown(self, cancel_futures):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    made = []

    def fresh(self, jobs):
        made.append(jobs)
        return Pool({1: False, 2: True, 3: None if len(made) == 1 else False}.get)

    monkeypatch.setattr(Workers, "_fresh", fresh)
    found = Workers(4).examine([1, 2, 3])
    assert found == [Finding("of 1"), Finding("its process died"), Finding("of 3")]
    assert made == [4, 1, 1]


# ------------------------------------------------------------------------------------------------ the decision


def times(**medians: float) -> dict[str, Quartiles]:
    """Each with quartiles at a tenth of it to either side."""
    return {name: Quartiles(t, 0.9 * t, 1.1 * t, 9, 1) for name, t in medians.items()}


def test_the_least_median_wins_unless_the_own_is_within_noise():
    assert tune.winner(times(own=10, other=7), "own") == "other"
    assert tune.winner(times(own=10, other=8.5), "own") == "own"
    assert tune.winner(times(own=10, other=12), "own") == "own"
    assert tune.winner(times(slow=10, other=9.9), "own") == "other", "the heuristic's own is not eligible"
    spread = {"steady": Quartiles(6, 5.9, 6.1, 9, 1), "fast": Quartiles(5, 4, 9, 9, 1)}
    assert tune.winner(spread, "own") == "fast"


def decided(monkeypatch, facts, times_ms, why=lambda part, form: "", is_together=None) -> tuple[dict, Plan]:
    """The row of a layer whose candidates take times_ms(part or name) and are eligible where `why` says nothing."""
    monkeypatch.setattr(tune, "why_not", lambda call: "")
    examine = lambda jobs: [Finding(w, w == "wrong") for w in (why(job.part, job.form) for job in jobs)]  # noqa: E731
    time_of = lambda calls: times(**{name: times_ms(name) for name in calls})  # noqa: E731
    row = tune.tuned(facts, 8, is_together, SimpleNamespace(examine=examine), tune.Timers(time_of, time_of), MOST)
    return row, measured.decoded(json.loads(json.dumps(row["plan"])))


def test_without_a_faster_one_the_heuristic_stays(monkeypatch):
    for width in (64, 512):
        for is_skinny in (False, True):
            facts = facts_of(width, is_skinny=is_skinny)
            row, plan = decided(monkeypatch, facts, lambda name: 1.0, is_together=is_skinny or None)
            assert plan == plans.plan_of(facts)
            assert (row["N"], row["K"], row["mode"], row["is_skinny"]) == (width, width, MODE, is_skinny)
            assert row["excluded"] == {}


def test_the_fastest_of_each_part_is_taken(monkeypatch):
    facts = facts_of(512)
    fast = {part: forms[-1] for part, forms in candidates(facts, 8, 1).items()}
    names = {label(form) for form in fast.values()}
    row, plan = decided(monkeypatch, facts, lambda name: 1.0 if name in names else 2.0)
    assert plan == Plan(**fast)
    assert row["milliseconds"]["weight"][label(fast["weight"])] == 1.0
    assert row["milliseconds"]["weight"]["None"] == 2.0


@pytest.mark.parametrize("why", ["spills 8 bytes", "wrong"])
def test_what_is_not_eligible_does_not_win(monkeypatch, why):
    facts = facts_of(512)
    tried = candidates(facts, 8, 1)
    own, fastest = label(tried["training"][0]), label(tried["training"][1])
    row, plan = decided(
        monkeypatch,
        facts,
        lambda name: {own: 2.0, fastest: 1.0}.get(name, 3.0),
        lambda part, form: why if part == "training" and label(form) == fastest else "",
    )
    assert label(plan.training) == own
    assert row["excluded"] == {f"training: {fastest}": why}
    assert row["is_wrong"] is (why == "wrong")
    assert fastest not in row["milliseconds"]["training"]


def test_a_narrow_layer_goes_in_pieces_where_a_step_of_training_is_faster_so(monkeypatch):
    facts = facts_of(64)
    for pieces, is_one in ((7.0, False), (9.0, True), (12.0, True)):
        of_steps = {"together": 10.0, "pieces": pieces}
        _, plan = decided(monkeypatch, facts, lambda name, of_steps=of_steps: of_steps.get(name, 1.0))
        assert isinstance(plan.backward, Together) is is_one
        assert (plan.training == plan.forward) or not is_one
    _, plan = decided(monkeypatch, facts_of(64, is_skinny=True), lambda name: 1.0, is_together=False)
    assert not isinstance(plan.backward, Together), "few rows follow many"
    row, plan = decided(monkeypatch, facts_of(64, is_skinny=True), lambda name: 1.0, is_together=True)
    assert isinstance(plan.backward, Together)
    assert row["milliseconds"].keys() == {"forward", "weight", "together", *WHOLE}


def test_a_step_is_forward_and_all_of_backward(monkeypatch):
    done = []
    monkeypatch.setattr(tune.Subject, "call", lambda self, part, form: lambda: done.append((part, form)))
    chosen = dict.fromkeys((*tune.PARTS, "together"), "its form")
    for parts in (tune.STEPS["together"], tune.STEPS["pieces"]):
        tune.Subject.of(facts_of(64), 8).step(chosen, parts)()
    assert [part for part, _ in done] == ["forward", "together", "training", "backward", "weight"]
    assert {form for _, form in done} == {"its form"}


def test_eager_is_noted_where_the_whole_layer_is_slower_beyond_noise(monkeypatch):
    for eager, expected in ((1.0, {"forward", "training"}), (1.9, set()), (3.0, set())):
        row, _ = decided(monkeypatch, facts_of(64), lambda name, ms=eager: {"eager": ms, "fused": 2.0}.get(name, 1.0))
        assert set(row["eager"]) == expected
        assert all(row["milliseconds"][kind] == {"fused": 2.0, "eager": eager} for kind in WHOLE)
    row, _ = decided(monkeypatch, facts_of(64), lambda name: {"eager": 0.5, "fused": 2.0}.get(name, 1.0))
    assert row["eager"]["forward"] == "0.5 ms by eager PyTorch, 2 fused"


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
def test_the_whole_layer_is_the_same_fused_and_eager(trains, monkeypatch):
    ran = []
    forward = launch._triton_forward
    monkeypatch.setattr(launch, "_triton_forward", lambda *given: (ran.append(given), forward(*given))[1])
    subject = tune.Subject.of(facts_of(32), 8)
    with tune.planned(plans.plan_of(facts_of(32))):
        fused, eager = (call() for call in subject.whole(trains).values())
    assert trains == isinstance(fused, tuple)
    for got, wanted in zip(fused if trains else [fused], eager if trains else [eager], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert len(ran) == 1, "eager launches nothing"


def test_a_part_without_any_form_is_an_error(monkeypatch):
    with pytest.raises(LookupError, match="no form of weight is left"):
        decided(monkeypatch, facts_of(512), lambda name: 1.0, lambda part, form: "dead" if part == "weight" else "")


# ------------------------------------------------------------------------------------------------ the command

ARGUMENTS = ["--widths", "32", "--most", "1", "--jobs", "0", *([] if HAS_GPU else ["--dry"])]


def test_what_it_writes_is_what_dispatch_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    out = tmp_path / "tiles.json"
    assert tune.main([*ARGUMENTS, "--rows", "72", "8", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {"gpu", "torch", "triton", "ptxas", "driver", "python", "commit", "date"} <= record.keys()
    assert [(row["N"], row["mode"], row["is_skinny"]) for row in record["layers"]] == [
        (32, MODE, False),
        (32, MODE, True),
    ]
    assert "is_wrong" not in record["layers"][0]
    assert record["layers"][0]["excluded"] == {}
    assert record["layers"][0]["milliseconds"].keys() == {*tune.PARTS, "together", "step", *WHOLE}

    out.rename(measured.file(record["gpu"]))
    gpu = Triton("", "cuda", 90, record["gpu"])
    for row, M in zip(record["layers"], (4096, 8), strict=True):
        x, weight = (torch.empty(shape, dtype=MODES[MODE].dtype, device="meta") for shape in ((M, 32), (32, 32)))
        plan, because = plans.explained(Operands(x, weight), LayerSpec(), gpu, x.dtype)
        assert plan == measured.decoded(row["plan"])
        assert set(because) == {f"measured on {record['gpu']}, {record['date']}"}


SEPARATE = Separate(Tile(16, 16, 16, 4, 2), None)


@pytest.fixture
def stubbed(monkeypatch):
    """The layers that the command tunes, by stubs that take ten seconds each."""
    done: list[tuple[int, bool]] = []
    plan = measured.encoded(plans.plan_of(facts_of(32)))

    def tuned(facts, rows, is_together, workers, timers, most):
        if facts.K == 48:
            raise LookupError("nothing is left")
        done.append((facts.N, facts.is_skinny, is_together))
        key = {"N": facts.N, "K": facts.K, "mode": facts.mode, "is_skinny": facts.is_skinny}
        chosen = {**plan, "backward": measured.encoded(SEPARATE)} if facts.K == 40 and len(done) < 3 else plan
        return {**key, "plan": chosen, "milliseconds": {}, "is_wrong": facts.N == 56}

    monkeypatch.setattr(tune, "tuned", tuned)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: 10.0 * len(done))
    monkeypatch.setattr(tune, "timers", lambda is_dry: None)
    return done


def run(out, *arguments: str) -> int:
    return tune.main([*ARGUMENTS[2:], "--out", str(out), *arguments])


def test_many_rows_come_first_and_no_layer_begins_after_the_budget(stubbed, tmp_path, capsys):
    out = tmp_path / "tiles.json"
    run(out, "--widths", "32", "64", "--rows", "8", "72", "--budget-s", "15")
    assert stubbed == [(32, False, None), (64, False, None)]
    assert capsys.readouterr().out.count("left out") == 2
    run(out, "--widths", "32", "64", "--rows", "8", "72")
    assert stubbed[2:] == [(32, True, True), (64, True, True)], "as many rows have decided; those are measured before"
    assert len(json.loads(out.read_text())["layers"]) == 4


def test_few_rows_are_measured_again_where_many_have_changed_their_mind(stubbed, tmp_path):
    out = tmp_path / "tiles.json"
    run(out, "--widths", "40", "--rows", "72", "8")
    assert stubbed == [(40, False, None), (40, True, False)]
    run(out, "--widths", "40", "--rows", "72", "--again")
    run(out, "--widths", "40", "--rows", "72", "8")
    assert stubbed[2:] == [(40, False, None), (40, True, True)], "in one kernel now"


def test_layers_that_are_not_square_have_rows_of_their_own(stubbed, tmp_path):
    for _ in range(2):
        run(tmp_path / "tiles.json", "--widths", "32", "32x64", "64x32", "32x32", "--rows", "72")
        assert len(stubbed) == 3, "each once"
    found = json.loads((tmp_path / "tiles.json").read_text())["layers"]
    assert [(row["N"], row["K"]) for row in found] == [(32, 32), (32, 64), (64, 32)]
    facts = tune.facts_of(64, 129, MODE, 72)
    assert (facts.N, facts.K, facts.is_described) == (64, 129, False)


def test_rows_of_other_versions_are_measured_again(stubbed, tmp_path):
    out = tmp_path / "tiles.json"
    once = [(32, False, None)]
    for arguments, expected in (((), once), ((), once), (("--again",), 2 * once)):
        run(out, "--widths", "32", "--rows", "72", *arguments)
        assert stubbed == expected
    record = json.loads(out.read_text())
    assert len(record["layers"]) == 1
    out.write_text(json.dumps({**record, "triton": "0.0"}))
    run(out, "--widths", "32", "--rows", "72")
    assert stubbed == 3 * once


def test_failures_are_said_and_the_next_layer_comes(stubbed, tmp_path):
    assert run(tmp_path / "a.json", "--widths", "48", "32", "--rows", "72") == 1
    assert stubbed == [(32, False, None)]
    assert run(tmp_path / "b.json", "--widths", "56", "--rows", "72") == 1, "a candidate was wrong"
    assert run(tmp_path / "c.json", "--widths", "32", "--rows", "72") == 0
