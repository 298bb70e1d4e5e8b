"""What a level sends, and how many processes of the client it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent
from llmopt.bench import resolve
from llmopt.bench.level import Loader, Work, prepare
from llmopt.bench.settings import BenchSettings, LoadShape
from llmopt.bench.workload.source import Source, open_source


def work(settings: BenchSettings, seed: int = 0, *, level: int = 0) -> Work:
    source = opened(settings)
    return prepare(settings, settings.loads(timed=source.timed)[level], source, seed)


def opened(settings: BenchSettings) -> Source:
    return open_source(settings.workload, None, settings.seed, templated=False)


def numbers(conversations: Sequence[Any]) -> list[int]:
    return [each.number for each in conversations]


def test_the_warm_up_takes_nothing_that_is_measured() -> None:
    found = work(resolve({"concurrency": 2, "requests": 4, "warmup": 3}))
    assert numbers(found.warmup) == [0, 1, 2]
    assert numbers(found.measured) == [3, 4, 5, 6]
    assert found.at_s is None


def test_the_warm_up_is_of_first_turns() -> None:
    found = work(resolve({"turns": 3, "requests": 4}))
    assert {len(each.turns) for each in found.warmup} == {1}
    assert {len(each.turns) for each in found.measured} == {3}


def test_what_a_rate_sends_ends_with_the_duration() -> None:
    found = work(resolve({"rate": 10, "arrivals": "constant", "duration_s": 2}))
    assert len(found.measured) == len(found.at_s or ()) == 20


def test_arrivals_are_new_in_every_round_and_the_same_for_a_seed() -> None:
    settings = resolve({"rate": 10, "requests": 5})
    assert work(settings, 1).at_s == work(settings, 1).at_s != work(settings, 2).at_s


@pytest.mark.parametrize("options", [{}, {"rate": 5.0, "duration_s": 60.0}, {"concurrency": 2}])
def test_a_trace_is_whole_in_every_level_whatever_was_taken_before(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [{"timestamp": 100 * i, "input_length": 9, "output_length": 2, "hash_ids": [i]} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = resolve({"workload": str(tmp_path / "t.jsonl"), **options})
    source = opened(settings)
    (load,) = settings.loads(timed=source.timed)
    assert [numbers(prepare(settings, load, source, seed).measured) for seed in range(2)] == [[0, 1, 2], [0, 1, 2]]


def test_a_trace_ends_with_the_duration(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 * i, "input_length": 9, "output_length": 2, "hash_ids": [i]} for i in range(5)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = work(resolve({"workload": str(tmp_path / "t.jsonl"), "duration_s": 1.0, "speed": 2.0}))
    assert found.at_s == [0.0, 0.5]


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """grow(share of a core, cores=4) -> the processes that each try took; work is shared evenly among them."""

    def run(busy: float, *, cores: int = 4, wall_s: float = 2.0, **options: Any) -> list[int]:
        tries: list[int] = []

        def measure(self: Loader, *_: object) -> Any:
            tries.append(self.processes)
            return SimpleNamespace(cpu_s=min(busy, self.processes) * wall_s, wall_s=wall_s, processes=self.processes)

        monkeypatch.setattr(Loader, "_measure", measure)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        loader = Loader(resolve({"concurrency": 4, **options}), silent, (), ())
        served = SimpleNamespace(direct=None, subject=SimpleNamespace(name="candidate"))
        loader.measure(served, work(loader.settings), 0)  # type: ignore[arg-type]
        assert len(loader.notes) == len(tries) - 1  # the server has seen the prompts of those before
        return tries

    return run


def test_processes_are_added_until_their_cores_are_enough(grow: Callable[..., list[int]]) -> None:
    assert grow(0.5) == [1]
    assert grow(1.5) == [1, 2]
    assert grow(3.0) == [1, 2, 4]


def test_there_are_no_more_processes_than_cores(grow: Callable[..., list[int]]) -> None:
    assert grow(9.0, cores=2) == [1, 2]
    assert grow(9.0, cores=1) == [1]


def test_as_many_processes_as_were_asked_for_are_left_at_that(grow: Callable[..., list[int]]) -> None:
    assert grow(9.0, processes=1) == [1]


def test_a_moment_of_load_adds_none(grow: Callable[..., list[int]]) -> None:
    assert grow(9.0, wall_s=0.01) == [1]


def test_a_sweep_asks_for_enough_at_every_load() -> None:
    streams, rate = (resolve({"sweep": kind, "requests": 8}) for kind in ("concurrency", "rate"))
    assert [streams.requests_at(streams.at_streams(n)) for n in (1, 16)] == [8, 64]
    assert [rate.requests_at(rate.at_rate(each)) for each in (1, 100)] == [8, 500]
    plain = resolve({"concurrency": 2, "requests": 8})
    assert plain.requests_at(LoadShape(label="c2", streams=2)) == 8
