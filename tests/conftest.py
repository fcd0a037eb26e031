"""The same tests natively on a GPU, and in Triton's interpreter without one."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers are as many as cores; threads on top of them only wait for each other
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it as it defines kernels

import pytest  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty hands out NaN, so that an element no kernel wrote shows in every comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
