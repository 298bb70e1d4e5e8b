"""requests.parquet: what was measured is on disk when its level ends, and says the same as the figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmopt.bench.metrics.figures import Level, summarise
from llmopt.bench.report.requests import PARTS, REQUESTS, Requests
from llmopt.bench.report.rows import grouped, read

MakeLevels = Callable[..., list[Level]]


@pytest.fixture
def few(make_levels: MakeLevels) -> list[Level]:
    return make_levels(streams=(1, 16), rounds=2, requests=12)


def written(out: Path, levels: list[Level]) -> Path:
    with Requests(out) as requests:
        for level in levels:
            requests.append(level)
    return out


def test_a_level_is_a_row_group(tmp_path: Path, few: list[Level]) -> None:
    file = pq.ParquetFile(written(tmp_path, few) / REQUESTS)
    groups = [file.read_row_group(number).slice(0, 1).to_pylist()[0] for number in range(file.num_row_groups)]
    found = [(row["subject"], row["level"], row["round"]) for row in groups]
    assert found == [(level.subject, level.load.label, level.round) for level in few]
    assert file.metadata.num_rows == sum(len(level.records) for level in few)


def test_a_row_has_every_stamp(tmp_path: Path, few: list[Level]) -> None:
    rows = pq.read_table(written(tmp_path, few[:1]) / REQUESTS).to_pylist()
    for row, record in zip(rows, few[0].records, strict=True):
        assert row["sent_us"] == (record.sent_ns - few[0].started_ns) // 1000
        assert row["chunks_us"] == [(stamp - record.sent_ns) // 1000 for stamp in record.stamps_ns]
        assert row["end_us"] == (record.end_ns - record.sent_ns) // 1000
        assert row["first_us"] == row["chunks_us"][0] == row["answer_us"]
        assert row["due_us"] is None


def test_a_failure_is_kept_with_what_it_got(tmp_path: Path, few: list[Level]) -> None:
    level = next(level for level in few if any(record.failure for record in level.records))
    rows = pq.read_table(written(tmp_path, [level]) / REQUESTS).to_pylist()
    (failed,) = (row for row in rows if row["error"])
    assert (failed["error"], failed["detail"], failed["counted"]) == ("cut", "ended in mid-token", False)
    assert len(failed["chunks_us"]) == 9


def test_a_late_request_was_due_before_its_sending(tmp_path: Path, few: list[Level]) -> None:
    records = [replace(record, due_ns=record.sent_ns - 3_000_000) for record in few[0].records]
    out = written(tmp_path, [replace(few[0], records=records)])
    assert set(pq.read_table(out / REQUESTS)["due_us"].to_pylist()) == {-3000}
    (rows,) = read(out)
    times = rows.times_ms()
    assert times["ttft_scheduled_ms"] == pytest.approx(times["ttft_ms"] + 3.0)


def test_a_killed_run_leaves_its_finished_levels(tmp_path: Path, few: list[Level]) -> None:
    requests = Requests(tmp_path)
    for level in few[:2]:
        requests.append(level)
    # killed here: nothing is closed
    table = pq.read_table(tmp_path / PARTS)
    assert table.num_rows == sum(len(level.records) for level in few[:2])


def test_an_interrupted_run_leaves_one_file(tmp_path: Path, few: list[Level]) -> None:
    def interrupted() -> None:
        with Requests(tmp_path) as requests:
            requests.append(few[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == [REQUESTS]
    assert len(read(tmp_path)) == 1


def test_without_a_level_there_is_no_file(tmp_path: Path) -> None:
    written(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    assert read(tmp_path) == []


def test_a_level_without_requests_changes_nothing(tmp_path: Path, few: list[Level]) -> None:
    out = written(tmp_path, [replace(few[0], records=()), few[1]])
    assert [rows.level for rows in read(out)] == [few[1].load.label]


def test_nothing_heavy_is_loaded_before_the_first_level() -> None:
    code = (
        "import sys; from pathlib import Path; from llmopt.bench.report import environment, folder; "
        "from llmopt.bench.report.requests import Requests; folder.prepare(Path(sys.argv[1])); "
        "environment.environment(); Requests(Path(sys.argv[1])); "
        "assert not {'pyarrow', 'numpy', 'rich', 'html'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, "."], check=True, timeout=60)


@pytest.mark.parametrize("name", ["ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"])
def test_rows_tell_the_figures(tmp_path: Path, few: list[Level], name: str) -> None:
    for (subject, label), rounds in grouped(read(written(tmp_path, few))):
        own = [level for level in few if (level.subject, level.load.label) == (subject, label)]
        summary: Any = summarise(own)[name]
        values = np.concatenate([rows.times_ms()[name] for rows in rounds])
        assert len(values) == summary["count"]
        assert np.percentile(values, [50, 99]) == pytest.approx([summary["p50"], summary["p99"]], abs=0.003)


def test_only_the_window_counts(tmp_path: Path, few: list[Level]) -> None:
    level = few[0]
    half_ns = (level.records[6].sent_ns - level.started_ns, 1 << 60)
    (rows,) = read(written(tmp_path, [replace(level, window_ns=half_ns)]))
    assert rows.counted.sum() == len(level.records) - 6
    assert len(rows.times_ms()["ttft_ms"]) == len(level.records) - 6
