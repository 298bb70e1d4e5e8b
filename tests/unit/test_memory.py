from __future__ import annotations

import pytest

from llmopt import memory


def test_memory_that_is_touched_is_counted() -> None:
    before = memory.usage()
    held = bytearray(b"x" * (64 << 20))
    after = memory.usage()
    assert 60 << 20 < after["rss_bytes"] - before["rss_bytes"] < 80 << 20
    assert after["peak_rss_bytes"] >= after["rss_bytes"]
    del held


def test_without_proc_there_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", memory.Path("/nowhere"))
    found = memory.usage()
    assert set(found) == {"peak_rss_bytes"}
    assert found["peak_rss_bytes"] > 1 << 20
