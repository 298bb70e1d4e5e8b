"""Lets the benchmarks import the modules beside them, which pytest's importlib mode does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return HERE.parents[1] / "demo" / "model"


@pytest.fixture(scope="session")
def outlier_model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """The demo model with activation outliers: the same function, much harder to quantize."""
    spec = importlib.util.spec_from_file_location("outliers", demo_model.parent / "outliers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("outliers") / "model"
    module.add_outliers(demo_model, folder)
    return folder
