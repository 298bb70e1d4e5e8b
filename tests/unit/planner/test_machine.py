from __future__ import annotations

import os

import pytest

from llmopt.planner.machine import machine
from llmopt.planner.precision import PRECISIONS, unsupported

pytest.importorskip("openvino")


def test_this_machine_is_a_row_of_hardware() -> None:
    row = machine(bandwidth_bytes_s=34e9, seconds=0.01)
    assert (row.kind, row.devices, row.price_usd_h) == ("cpu", 1, None)
    assert row.bandwidth_bytes_s == 34e9
    assert 0 < row.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert set(row.flops) == {"fp32", "fp16", "int8"}
    assert all(1e9 < rate < 1e15 for rate in row.flops.values())
    assert unsupported(PRECISIONS["w4a16"], row) is None
    assert "34.0 GB/s of memory" in row.source
    assert 1e9 < row.streams["w4a16"] <= 34e9
    assert unsupported(PRECISIONS["fp8"], row) == "here has no FP8 arithmetic"


@pytest.fixture(autouse=True)
def _smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.planner.machine._WIDE_OUT", 8192)  # 32 MiB take less than 256 to lay out


def test_the_bandwidth_is_measured_where_it_is_not_given() -> None:
    assert 1e9 < machine(seconds=0.01).bandwidth_bytes_s < 1e13
