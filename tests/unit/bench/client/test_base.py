"""Splitting a plan and joining what its parts brought."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.client.base import Job, Load, Plan, Target

TARGETS = (Target("http://127.0.0.1:1", "/"),)


def make_plan(jobs: int, *, streams: int | None = None, in_flight: int | None = None) -> Plan:
    made = [Job(b"", number, due_ns=number * 1000 if streams is None else None) for number in range(jobs)]
    return Plan(targets=TARGETS, jobs=made, streams=streams, in_flight=in_flight)


def make_load(records: list[int], *, stamps: str = "kernel", started_ns: int = 100, wall_s: float = 1.0) -> Load[int]:
    return Load(records, started_ns, wall_s, 0.5, [0.1], [0.2], 1, stamps)


sizes = st.integers(1, 40)


@given(jobs=sizes, streams=st.none() | sizes, in_flight=st.none() | sizes, parts=st.integers(1, 8))
def test_a_split_loses_and_doubles_nothing(jobs: int, streams: int | None, in_flight: int | None, parts: int) -> None:
    whole = make_plan(jobs, streams=streams, in_flight=in_flight)
    split = whole.split(parts)
    assert 1 <= len(split) <= parts
    assert sorted(job.prompt for part in split for job in part.jobs) == list(range(jobs))
    assert all(part.jobs for part in split)
    if streams is not None:
        assert sum(part.streams or 0 for part in split) == streams
        assert all(part.streams for part in split)
    if in_flight is not None:
        assert sum(part.in_flight or 0 for part in split) == in_flight
        assert all(part.in_flight for part in split)


@given(jobs=st.integers(10, 100), parts=st.integers(2, 4))
def test_each_part_has_its_share_of_every_moment_of_a_schedule(jobs: int, parts: int) -> None:
    for part in make_plan(jobs).split(parts):
        due = [job.due_ns or 0 for job in part.jobs]
        assert [later - earlier for earlier, later in pairwise(due)] == [parts * 1000] * (len(due) - 1)


def test_jobs_are_shared_as_streams_are() -> None:
    split = make_plan(50, streams=5).split(2)
    assert [(part.streams, len(part.jobs)) for part in split] == [(3, 30), (2, 20)]


def test_joined_loads_have_all_records_and_samples() -> None:
    joined = Load.merged([make_load([1, 2], wall_s=2.0), make_load([3], started_ns=90)])
    assert joined.records == [1, 2, 3]
    assert (joined.started_ns, joined.wall_s, joined.cpu_s, joined.reconnects, joined.processes) == (90, 2.0, 1.0, 2, 2)
    assert (joined.lags_ms, joined.late_ms) == ([0.1, 0.1], [0.2, 0.2])


@pytest.mark.parametrize(
    ("kinds", "joined"),
    [(["kernel", "kernel"], "kernel"), (["user", "user"], "user"), (["kernel", "user"], "mixed")],
)
def test_joined_stamps_are_of_one_kind_only_if_all_are(kinds: list[str], joined: str) -> None:
    assert Load.merged([make_load([], stamps=kind) for kind in kinds]).stamps == joined
