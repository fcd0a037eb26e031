"""The same tests on every backend: Triton's kernels on a GPU, or interpreted without one, and the C++ engine.

A test that takes `device` or `backend` runs on the backends that its mark `backends` names, or on Triton alone.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch

HAS_GPU = torch.cuda.is_available()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers are as many as cores; threads on top of them only wait for each other
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it as it defines kernels

import pytest  # noqa: E402

from fusedres import dispatch, measured, native, plain_layer, plans  # noqa: E402
from fusedres.kernels.cpu import launch  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): the backends that the test runs on: triton, cpu")
    config.addinivalue_line("markers", "launches_nothing: on the CPU backend the test may call no kernel")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = metafunc.definition.get_closest_marker("backends")
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if marked and "backend" in metafunc.fixturenames and not any("backend" in names for names in chosen):
        metafunc.parametrize("backend", marked.args, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C++ engine, in the place of the interpreter that the rest of the suite runs on a CPU."""
    require_engine()
    if not HAS_GPU and find_spec("triton") is not None:
        import fusedres.kernels.triton.layer_backward  # noqa: F401 : interpreted, as later tests expect it
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """triton or cpu: whose kernels run tensors on `device`."""
    name = getattr(request, "param", "triton")
    if name == "triton":
        yield name
        return
    request.getfixturevalue("engine")
    launches = count_launches(monkeypatch)
    if request.node.callspec.params.get("dtype") == torch.bfloat16:
        choice = dispatch.backend(torch.device("cpu"), torch.bfloat16)
        if isinstance(choice, dispatch.Eager):
            pytest.skip(choice.because)
    yield name
    if "launches_nothing" not in request.keywords:
        assert launches, "the C++ engine did not run: this test has proved nothing of it"


@pytest.fixture
def launches(engine: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C++ engine's launchers, as they are called."""
    return count_launches(monkeypatch)


def require_engine() -> None:
    """Skips where this machine has no C++ compiler, and fails where it has one and yet no engine."""
    if reason := native.missing():
        try:
            native.find_compiler()
        except native.Unavailable as error:
            pytest.skip(str(error))
        pytest.fail(f"there is a compiler, but no engine: {reason}")


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the engine's launchers, as they are called."""
    launches: list[str] = []

    def counted(name):
        call = getattr(launch, name)
        return lambda *arguments: (launches.append(name), call(*arguments))[1]

    kinds = (
        "forward",
        "backward",
        "layer",
        "network_forward",
        "network_backward",
        "run",
        "statistics",
        "residual_forward",
        "residual_backward",
    )
    for name in kinds:
        monkeypatch.setattr(launch, name, counted(name))
    return launches


def forget_choices() -> None:
    """Whatever was decided, or compiled, in view of the environment."""
    dispatch._cached_backend.cache_clear()
    plain_layer.forget()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _fused_where_eager_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of which that is committed; tests of fused layers would be of eager ones."""
    monkeypatch.setattr(measured, "has_eager", lambda gpu: False)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Narrow layers too have dz and dx in kernels of their own, in Triton."""
    monkeypatch.setattr(plans, "TOGETHER_UP_TO", 0)
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def device(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


@pytest.fixture
def fused(backend: str) -> str:
    """What `explain` calls the backend."""
    return "native" if backend == "cpu" else "triton" if HAS_GPU else "triton-interpreter"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty hands out NaN, so that an element no kernel wrote shows in every comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
