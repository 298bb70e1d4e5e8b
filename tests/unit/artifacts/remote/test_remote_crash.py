"""However a process that talks to an S3 server is killed, what can be found is whole and the next one succeeds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from servers.places import Place

CRASH = Path(__file__).with_name("crash_remote.py")
JOBS = ("push", "pull", "gc")


def crash(folder: Path, place: Place, job: str, every: int, at_random: int) -> dict[str, Any]:
    assert place.server is not None
    command = [sys.executable, CRASH, folder, place.url, json.dumps(asdict(place.server)), job, every, at_random]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_between_any_two_requests_what_can_be_found_is_whole(s3_place: Place, tmp_path: Path, job: str) -> None:
    report = crash(tmp_path, s3_place, job, every=9, at_random=1)
    assert report["killed"] >= 2


@pytest.mark.bench
def test_killed_two_hundred_times_what_can_be_found_is_whole(s3_place: Place, tmp_path: Path) -> None:
    reports = [crash(tmp_path, s3_place, job, every=1, at_random=40) for job in JOBS]
    assert sum(report["killed"] for report in reports) >= 200
    assert s3_place.server is not None
    print(f"\nkill -9 while talking to {s3_place.server.name}, before and after each request and at random times:")
    for report in reports:
        print(f"  {report['job']}: killed {report['killed']} times ({report['requests']} requests), nothing partial")
