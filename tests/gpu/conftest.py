"""What a GPU has to confirm. Where the arithmetic exists on a CPU too, the same test runs there, so that it is known
to work before a GPU is had.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def no_gpu() -> str | None:
    """Why the tests of a GPU cannot run here; None where they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


def pytest_runtest_setup(item: pytest.Item) -> None:
    here = Path(__file__).parent in item.path.parents
    if here and item.get_closest_marker("gpu") is not None and (reason := no_gpu()) is not None:
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
