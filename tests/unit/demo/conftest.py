"""The demo's scripts as modules, and what they made."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[3]


def load(name: str) -> Iterator[ModuleType]:
    """Load demo/<name>.py as a module of that name for as long as the fixture lives."""
    spec = importlib.util.spec_from_file_location(name, REPO / "demo" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="session")
def corpus() -> Iterator[ModuleType]:
    yield from load("corpus")


@pytest.fixture(scope="session")
def train(corpus: ModuleType) -> Iterator[ModuleType]:
    """demo/train.py; it imports `corpus`, which that fixture has put in place."""
    yield from load("train")


@pytest.fixture(scope="session")
def outliers() -> Iterator[ModuleType]:
    yield from load("outliers")


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return REPO / "demo" / "model"


@pytest.fixture(scope="session")
def text_folder() -> Path:
    return REPO / "llmopt" / "profiles" / "text"
