"""The load on an engine without a server: what HTTP, its JSON and the text side cost is the difference.

The engine runs in a child process (`llmopt.serve.direct`) that takes the same request bodies as the server, but over a
pipe, and stamps the tokens of each step itself. So records are as those of a server, with a stamp a token.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson

from llmopt.bench.client.base import Failure, Interrupted, Job, Load, Plan
from llmopt.bench.metrics.records import Record
from llmopt.bench.serving import START_TIMEOUT_S, last_lines
from llmopt.errors import LlmoptError, MeasurementInvalidError

_STOP_TIMEOUT_S = 10.0


def direct_command(engine: Path) -> list[str]:
    """The command line that drives `engine` by the protocol of `llmopt.serve.direct`."""
    return [sys.executable, "-m", "llmopt.serve.direct", str(engine)]


@contextmanager
def running(
    name: str,
    engine: Path,
    log: Path,
    command: Callable[[Path], Sequence[str]] = direct_command,
    *,
    start_timeout_s: float = START_TIMEOUT_S,
    stop_timeout_s: float = _STOP_TIMEOUT_S,
) -> Iterator[Direct]:
    """Load the engine, and let go of it at the end. Raises LlmoptError if it cannot be loaded."""
    with log.open("ab") as log_file:
        process = subprocess.Popen(
            [*command(engine)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,  # Ctrl-C at the terminal is for bench
        )
        try:
            direct = Direct(name, log, process)
            direct.wait_until_ready(start_timeout_s)
            yield direct
        finally:
            _stop(process, stop_timeout_s)


class Direct:
    """A loaded engine; `drive` it as often as you like."""

    def __init__(self, name: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._name = name
        self._log = log
        self._process = process
        self._in = process.stdin
        self._out = process.stdout.fileno()
        self._partial = b""
        self._last_id = 0  # over all loads: what a cancelled request still says is of an unknown id then

    def wait_until_ready(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        messages: list[Any] = []
        while not messages and time.monotonic() < deadline_s:
            try:
                messages = self.receive(deadline_s - time.monotonic())
            except MeasurementInvalidError as error:
                raise LlmoptError(f"the engine of `{self._name}` did not start", hint=error.hint) from None
        if not messages:
            raise LlmoptError(f"`{self._name}` was not loaded within {timeout_s:g} s", hint=last_lines(self._log))
        if "ready" not in messages[0]:
            raise LlmoptError(f"`{self._name}` cannot be loaded: {messages[0].get('fatal')}")

    def drive(self, plan: Plan) -> Load[Record]:
        """The closed loop of the plan; its targets do not matter.

        Raises MeasurementInvalidError if the engine dies, Interrupted on Ctrl-C.
        """
        if plan.streams is None:
            raise LlmoptError("an engine without a server has no open loop", hint="give `--concurrency`")
        if any(job.then is not None for job in plan.jobs):
            raise LlmoptError("an engine without a server has no conversations", hint="give a workload of one turn")
        loop = _ClosedLoop(self, plan, time.monotonic_ns())
        cpu_ns = time.thread_time_ns()
        interrupted = False
        try:
            loop.run()
        except KeyboardInterrupt:
            interrupted = True
            loop.give_up(Failure("interrupted", "the load was stopped"), older_than_ns=0)
        wall_s = (time.monotonic_ns() - loop.began_ns) / 1e9
        cpu_s = (time.thread_time_ns() - cpu_ns) / 1e9
        load = Load(loop.records, loop.began_ns, wall_s, cpu_s, loop.lags_ms, [], 0, "engine")
        if interrupted:
            raise Interrupted(load)
        return load

    def ask(self, job: Job) -> int:
        """Hand a job over; returns the id that its messages have."""
        self._last_id += 1
        self._send(b'{"id":%d,"body":%b}\n' % (self._last_id, job.request.partition(b"\r\n\r\n")[2]))
        return self._last_id

    def cancel(self, id_: int) -> None:
        self._send(b'{"cancel":%d}\n' % id_)

    def receive(self, timeout_s: float) -> list[Any]:
        """The messages that come within the time; none when it is over."""
        if not select.select([self._out], [], [], max(0.0, timeout_s))[0]:
            return []
        data = os.read(self._out, 1 << 20)
        if not data:
            self._died()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [orjson.loads(line) for line in lines]

    def _send(self, line: bytes) -> None:
        try:
            self._in.write(line)
            self._in.flush()
        except BrokenPipeError:
            self._died()

    def _died(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        raise MeasurementInvalidError(f"the engine of `{self._name}` died", hint=last_lines(self._log))


class _ClosedLoop:
    """One load: so many requests with the engine at once, each followed by the next."""

    def __init__(self, direct: Direct, plan: Plan, began_ns: int) -> None:
        self.began_ns = began_ns
        self.records: list[Record] = []
        self.lags_ms: list[float] = []
        self._direct = direct
        self._streams = plan.streams or 0
        self._timeout_ns = int(plan.timeout_s * 1e9)
        self._deadline_ns = None if plan.duration_s is None else began_ns + int(plan.duration_s * 1e9)
        self._jobs = cycle(plan.jobs) if plan.repeat else iter(plan.jobs)
        self._asked: dict[int, _Asked] = {}  # in the order of their sending

    def run(self) -> None:
        self._fill()
        while self._asked:
            oldest_ns = next(iter(self._asked.values())).sent_ns
            for message in self._direct.receive((oldest_ns + self._timeout_ns - time.monotonic_ns()) / 1e9):
                self._take(message)
            late = Failure("timeout", f"no end within {self._timeout_ns / 1e9:g} s")
            self.give_up(late, older_than_ns=self._timeout_ns)
            self._fill()

    def give_up(self, failure: Failure, *, older_than_ns: int) -> None:
        now_ns = time.monotonic_ns()
        for id_ in [id_ for id_, asked in self._asked.items() if now_ns - asked.sent_ns >= older_than_ns]:
            self._direct.cancel(id_)
            self.records.append(self._asked.pop(id_).record(now_ns, failure))

    def _fill(self) -> None:
        while len(self._asked) < self._streams:
            now_ns = time.monotonic_ns()
            if self._deadline_ns is not None and now_ns >= self._deadline_ns:
                return
            job = next(self._jobs, None)
            if job is None:
                return
            self._asked[self._direct.ask(job)] = _Asked(job, now_ns)

    def _take(self, message: Any) -> None:
        """Put the message's events to their requests, and requests that have ended to the records."""
        if "id" in message:
            if asked := self._asked.get(message["id"]):
                asked.prompt_tokens = message["prompt_tokens"]
            return
        at_ns = message["at_ns"]
        self.lags_ms.append((time.monotonic_ns() - at_ns) / 1e6)
        for id_, count, finish, error in message["events"]:
            asked = self._asked.get(id_)
            if asked is None:  # given up
                continue
            if count:
                asked.tokens += count
                asked.stamps_ns.append(at_ns)
            if finish or error:
                asked.finish = finish
                failure = Failure("server_error", error) if error else None
                self.records.append(self._asked.pop(id_).record(at_ns, failure))


@dataclass(slots=True)
class _Asked:
    """A request that the engine is at."""

    job: Job
    sent_ns: int
    stamps_ns: array[int] = field(default_factory=lambda: array("q"))
    tokens: int = 0
    prompt_tokens: int | None = None
    finish: str | None = None

    def record(self, end_ns: int, failure: Failure | None) -> Record:
        return Record(
            prompt=self.job.prompt,
            status=0,
            sent_ns=self.sent_ns,
            end_ns=end_ns,
            stamps_ns=self.stamps_ns,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens,
            streamed=True,
            failure=failure,
            turn=self.job.turn,
            target=self.job.target,
            answer_ns=self.stamps_ns[0] if self.stamps_ns else None,
            wanted_tokens=self.job.wanted_tokens,
            finish=self.finish,
        )


def _stop(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Close its stdin, at which it ends; kill it if it does not."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
