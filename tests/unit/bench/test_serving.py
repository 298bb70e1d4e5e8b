from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from llmopt.bench import serving as server
from llmopt.bench.serving import serve_command, serving
from llmopt.errors import Exit, LlmoptError, MeasurementInvalidError

MakeEngine = Callable[[str], Path]
Command = Callable[[Path], list[str]]


def is_running(pid: int) -> bool:
    """False for a zombie too: nobody may be there to reap an orphan."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def pids_in(log: Path) -> list[int]:
    return [int(pid) for pid in re.findall(r"^(?:pid|child) (\d+)$", log.read_text(), re.MULTILINE)]


def test_a_server_runs_inside_the_block_only(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    with serving("candidate", make_engine(""), tmp_path / "log", fake_serve) as running:
        with urllib.request.urlopen(running.url + "/v1/models", timeout=10) as response:
            assert response.status == 200
        running.check_alive(0.0)
        (pid,) = pids_in(tmp_path / "log")
        assert os.getpgid(pid) == pid != os.getpgid(0)
    assert not is_running(pid)


def test_a_server_is_stopped_when_the_block_fails(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), serving("candidate", make_engine(""), tmp_path / "log", fake_serve):
        raise KeyboardInterrupt
    assert not is_running(pids_in(tmp_path / "log")[0])


def test_what_the_server_started_is_stopped_too(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    with serving("candidate", make_engine("child"), tmp_path / "log", fake_serve):
        pids = pids_in(tmp_path / "log")
        assert len(pids) == 2
    assert all(wait_until_gone(pid) for pid in pids)


def test_a_server_that_will_not_stop_is_killed(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_STOP_TIMEOUT_S", 0.3)
    with serving("candidate", make_engine("stubborn"), tmp_path / "log", fake_serve):
        (pid,) = pids_in(tmp_path / "log")
    assert not is_running(pid)


def test_a_server_that_cannot_start_says_its_last_lines(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    with (
        pytest.raises(LlmoptError, match=r"the server of `candidate` did not start \(exit code 3\)") as caught,
        serving("candidate", make_engine("broken"), tmp_path / "server.log", fake_serve),
    ):
        pass
    assert caught.value.hint == (
        "the last lines of its log `server.log`:\n  loading\n  RuntimeError: no such device: NPU"
    )


def test_a_server_that_is_never_ready_is_given_up(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(LlmoptError, match=r"was not ready within 0\.3 s"),
        serving("candidate", make_engine("slow"), tmp_path / "log", fake_serve, start_timeout_s=0.3),
    ):
        pass
    assert time.monotonic() - began < 15


def test_a_program_that_is_missing_is_an_error(make_engine: MakeEngine, tmp_path: Path) -> None:
    with (
        pytest.raises(LlmoptError, match="did not start") as caught,
        serving("candidate", make_engine(""), tmp_path / "log", lambda engine: ["/no/such/program"]),
    ):
        pass
    assert "/no/such/program" in (caught.value.hint or "")


def test_a_server_that_died_is_found_with_its_last_lines(
    make_engine: MakeEngine, fake_serve: Command, tmp_path: Path
) -> None:
    with serving("candidate", make_engine(""), tmp_path / "log", fake_serve) as running:
        os.kill(running.process.pid, signal.SIGKILL)
        with pytest.raises(MeasurementInvalidError, match=r"died under load \(killed by SIGKILL\)") as caught:
            running.check_alive(10.0)
    assert caught.value.code is Exit.MEASUREMENT_INVALID
    assert "pid " in (caught.value.hint or "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_server_dies_with_a_killed_bench(make_engine: MakeEngine, fake_serve: Command, tmp_path: Path) -> None:
    log, engine = tmp_path / "log", make_engine("stubborn")
    program = f"""
import time
from pathlib import Path
from llmopt.bench.serving import serving
with serving("candidate", Path({str(engine)!r}), Path({str(log)!r}), lambda _: {fake_serve(engine)!r}):
    print("up", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "up\n"
        (pid,) = pids_in(log)
        assert is_running(pid)
        bench.kill()
    assert wait_until_gone(pid)


def test_the_command_serves_the_engine_on_a_free_port() -> None:
    command = serve_command(Path("some/engine"))
    assert command[0] == sys.executable
    assert command[1:] == ["-m", "llmopt", "serve", "some/engine", "--host", "127.0.0.1", "--port", "0"]
