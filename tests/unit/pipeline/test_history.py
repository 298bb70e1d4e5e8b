from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.store import Store
from llmopt.errors import LlmoptError
from llmopt.pipeline import history

Stored = Callable[..., str]


@pytest.fixture
def stored(store: Store, action: Callable[..., Any], tmp_path: Path) -> Stored:
    """stored(ttft, concurrency=[1], **fields of the action) -> id of a report."""
    made = iter(range(1000))

    def put(ttft: float | None, *, op: str = "bench", inputs: dict[str, str] | None = None, **settings: Any) -> str:
        folder = tmp_path / f"staged{next(made)}"
        folder.mkdir()
        (folder / "report.json").write_text(folder.name)
        figures = {"c1": {"ttft_ms_p50": ttft, "requests": 8}}
        own = action(op=op, inputs=inputs or {"candidate": "sha256:a"}, settings={"concurrency": [1], **settings})
        return store.put(folder, kind="report", action=own, metrics={"candidate": figures}).id  # type: ignore[dict-item]

    return put


def values(store: Store, like: str | None = None) -> list[float]:
    (one,) = history.series(history.reports(store, like), ["ttft_ms_p50"])
    return list(one.values)


def test_reports_come_oldest_first(store: Store, stored: Stored) -> None:
    for ttft in (10.0, 11.0, 12.0):
        stored(ttft)
    assert values(store) == [10.0, 11.0, 12.0]


def test_whatever_was_loaded_and_however_often_is_alike(store: Store, stored: Stored) -> None:
    stored(10.0, seed=1, rounds=1)
    stored(11.0, inputs={"candidate": "sha256:b"}, seed=2, rounds=12, gate=True, slo=["errors<=0"])
    assert values(store) == [10.0, 11.0]


def test_other_settings_and_other_data_are_another_history(store: Store, stored: Stored) -> None:
    first = stored(10.0)
    stored(11.0, output_tokens=9)
    stored(12.0, inputs={"candidate": "sha256:a", "workload": "sha256:c"})
    stored(13.0, op="bench.import")
    assert values(store, first) == [10.0]
    assert values(store) == [13.0]


def test_a_change_names_its_report(store: Store, stored: Stored) -> None:
    ids = [stored((10.0 if n < 12 else 20.0) * (1 + 0.01 * (n % 3))) for n in range(24)]
    (one,) = history.series(history.reports(store), ["ttft_ms_p50"])
    (change,) = one.to_json()["changes"]  # type: ignore[misc]
    assert change["artifact"] == ids[12]  # type: ignore[index,call-overload]


def test_a_report_without_the_figure_is_passed_over(store: Store, stored: Stored) -> None:
    stored(10.0)
    stored(None)
    stored(12.0)
    assert values(store) == [10.0, 12.0]


def test_a_figure_that_no_report_has_is_an_error(store: Store, stored: Stored) -> None:
    stored(10.0)
    with pytest.raises(LlmoptError, match="no report has the figure `ttft_ms_p5`") as caught:
        history.series(history.reports(store), ["ttft_ms_p5"])
    assert caught.value.hint == "did you mean `ttft_ms_p50`?"


def test_a_store_without_a_load_test_says_how_to_make_one(store: Store, stored: Stored) -> None:
    stored(10.0, op="eval")
    with pytest.raises(LlmoptError, match="no load test"):
        history.reports(store)
