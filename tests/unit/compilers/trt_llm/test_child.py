from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from llmopt.compilers.trt_llm import child
from llmopt.compilers.trt_llm.child import Child, how, last_lines, out_of_memory, running

Start = Callable[..., AbstractContextManager[Child]]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, said: list[str]) -> Start:
    """start(script) runs it in a Python of its own, with the log at tmp_path / "log"."""

    @contextmanager
    def run(script: str, *command: str, cleanup: tuple[str, ...] = ()) -> Iterator[Child]:
        with running(
            command or [sys.executable, "-c", script],
            tmp_path / "log",
            lambda line, /, **facts: said.append(line),
            folder=tmp_path,
            environment={"PYTHONUNBUFFERED": "1", "GREETING": "hello"},
            cleanup=cleanup,
        ) as running_:
            yield running_

    return run


def end_of(process: Child) -> int:
    while (code := process.poll()) is None:
        pass
    return code


def test_the_exit_code_is_the_commands(start: Start) -> None:
    with start("raise SystemExit(7)") as process:
        assert end_of(process) == 7
    with start("import os; os.kill(os.getpid(), 11)") as process:
        assert how(end_of(process)) == "killed by SIGSEGV"


def test_a_program_that_is_missing_is_told_in_the_log(start: Start, tmp_path: Path) -> None:
    with start("", "/no/such/program") as process:
        assert how(end_of(process)) == "exit code 127"
    assert "/no/such/program: No such file or directory" in last_lines(tmp_path / "log")


def test_output_is_passed_on_line_by_line_and_kept(start: Start, said: list[str], tmp_path: Path) -> None:
    script = (
        "import os, sys; print(os.environ['GREETING']); print('10 %\\r20 %'); print('oops', file=sys.stderr, end='')"
    )
    with start(script) as process:
        end_of(process)
    assert said == ["hello", "20 %", "oops"]
    assert (tmp_path / "log").read_bytes() == b"hello\n10 %\r20 %\noops"


def test_a_line_is_not_passed_on_before_it_is_whole(start: Start, said: list[str]) -> None:
    script = "import time; print('half', end='', flush=True); time.sleep(0.5); print(' and half')"
    with start(script) as process:
        end_of(process)
    assert said == ["half and half"]


def test_the_command_has_the_signals_that_a_shell_would_give_it(start: Start, said: list[str]) -> None:
    script = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM) == 0)"
    with start(script) as process:
        end_of(process)
    assert said == ["set() True"]


def test_what_lives_elsewhere_is_cleaned_up_unless_all_went_well(start: Start, tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    with start("", cleanup=("touch", str(mark))) as process:
        end_of(process)
    assert not mark.exists()
    with start("raise SystemExit(1)", cleanup=("touch", str(mark))) as process:
        end_of(process)
    assert mark.exists()


STUBBORN = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(600)"


def test_an_error_in_the_block_ends_the_command(start: Start, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_S", 0.1)

    def fail() -> None:
        with start(STUBBORN) as process:
            wait_for_its_pid(process, said)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_gone(int(said[0]))


INTERRUPTED_TWICE = """
import os, pathlib, signal, sys, threading, time
from llmopt.compilers.trt_llm import child
child._GRACE_S = 60.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
folder, said = pathlib.Path(sys.argv[1]), []
command = [sys.executable, "-u", "-c", sys.argv[2]]
try:
    with child.running(command, folder / "log", said.append, folder=folder, environment={}) as process:
        while not said:
            process.poll(0.05)
        print(said[0], flush=True)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_second_interrupt_ends_the_grace(tmp_path: Path) -> None:
    """In a process of its own: the signal is for one whose threads are all Python's."""
    began_s = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE, str(tmp_path), STUBBORN], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 130, ran.stderr
    assert time.monotonic() - began_s < 20
    assert is_gone(int(ran.stdout))


def wait_for_its_pid(process: Child, said: list[str]) -> None:
    while not said:
        assert process.poll(0.05) is None


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


GPU, HOST = "ran out of GPU memory", "ran out of memory"
KILLED = "was killed, as by a system that ran out of memory"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[TRT] [E] 2: [globWriter.cpp::makeResizableGpuMemory::423] Error Code 2: OutOfMemory", 1, GPU),
        ("[TRT] [W] Requested amount of GPU memory (24793579520 bytes) could not be allocated.", 1, GPU),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", 1, GPU),
        ("due to insufficient memory on requested size\n[E] Could not find any implementation for node", 1, GPU),
        ("Skipping tactic 0 due to insufficient memory\nAssertionError: shape mismatch", 1, None),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate", 1, HOST),
        ("Traceback\nMemoryError", 1, HOST),
        ("concurrent.futures.process.BrokenProcessPool: A process was terminated abruptly", 1, KILLED),
        ("", 137, KILLED),
        ("", 143, None),
        ("error: unrecognized arguments: --memory", 2, None),
    ],
)
def test_which_memory_ran_out_is_read_from_the_log(tmp_path: Path, text: str, code: int, words: str | None) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert out_of_memory(log, code) == words


def test_the_last_lines_are_few_and_their_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n\n" for number in range(100)))
    lines = last_lines(log).splitlines()
    assert lines[0] == f"the last lines of its log `{log}`:"
    assert (lines[1], lines[-1], len(lines)) == ("  line 80", "  line 99", 21)
    log.write_text("")
    assert last_lines(log) == f"its log `{log}` is empty"
