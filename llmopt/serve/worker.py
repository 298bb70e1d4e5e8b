"""The process that owns the runtime: `python -m llmopt.serve.worker FD`, started by engine.py.

It is a process of its own because the runtime's `step()` holds the interpreter's lock for as long as it computes: in
the server's process a long prompt would stop every other connection, and `/health`, for the whole of each step.
A crash of the runtime also ends here, and the server can still say so.

Messages are lines of JSON over a socket. In: a configuration, then `{"add": id, ...}` and `{"cancel": id}`.
Out: `{"ready": true}` or `{"fatal": message}`, then after each step one list of `[id, tokens, finish, error]`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

from llmopt.backends import load
from llmopt.serve.folder import blocks_for

Event: TypeAlias = "tuple[int, list[int], str | None, str | None]"


@dataclass(slots=True)
class _Running:
    handle: Any  # openvino_genai.GenerationHandle
    blocks: int
    cancelled: bool = False


class Worker:
    """Requests wait in order until the cache holds the whole of them, so the runtime never has to evict one.

    An evicted sequence is computed anew in other chunks, and its greedy tokens may then differ.
    """

    def __init__(self, pipeline: Any, *, blocks: int, max_batch: int, eos_token_ids: list[int]) -> None:
        self._pipeline = pipeline
        self._free_blocks = blocks
        self._max_batch = max_batch
        self._eos_token_ids = eos_token_ids
        self._waiting: deque[dict[str, Any]] = deque()
        self._running: dict[int, _Running] = {}

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, request: dict[str, Any]) -> None:
        self._waiting.append(request)

    def cancel(self, id_: int) -> None:
        """Forget a request; a running one leaves the batch with the next step. An unknown id has just finished."""
        if id_ in self._running:
            self._running[id_].cancelled = True
            self._running[id_].handle.cancel()
        else:
            self._waiting = deque(request for request in self._waiting if request["add"] != id_)

    def step(self) -> list[Event]:
        """Start what fits, compute one step, return the new tokens."""
        events = self._admit()
        if self._running:
            self._pipeline.step()
            for id_ in list(self._running):
                events.extend(self._collect(id_, self._running[id_]))
        return events

    def _admit(self) -> list[Event]:
        refused: list[Event] = []
        while self._waiting and len(self._running) < self._max_batch:
            request = self._waiting[0]
            blocks = blocks_for(len(request["tokens"]) + request["max_tokens"])
            if blocks > self._free_blocks:
                break
            self._waiting.popleft()
            try:
                handle = self._start(request)
            except (RuntimeError, ValueError, TypeError) as error:
                refused.append((request["add"], [], None, f"the runtime refused the request: {_first_line(error)}"))
                continue
            self._free_blocks -= blocks
            self._running[request["add"]] = _Running(handle, blocks)
        return refused

    def _start(self, request: dict[str, Any]) -> Any:
        import numpy as np

        tokens_BT = load("openvino").Tensor(np.array([request["tokens"]], dtype=np.int64))
        return self._pipeline.add_request(request["add"], tokens_BT, generation_config(request, self._eos_token_ids))

    def _collect(self, id_: int, running: _Running) -> list[Event]:
        """The events of one request after a step; one that has ended gives its blocks back."""
        tokens: list[int] = []
        finish: str | None = None
        while running.handle.can_read():
            for output in running.handle.read().values():
                tokens.extend(output.generated_ids)
                finish = {"STOP": "stop", "LENGTH": "length"}.get(output.finish_reason.name)
        status = running.handle.get_status().name
        if status != "RUNNING":
            del self._running[id_]
            self._free_blocks += running.blocks
            if running.cancelled:
                return []
            if finish is None:
                return [(id_, tokens, None, f"the runtime dropped the request: {status.lower()}")]
        return [(id_, tokens, finish, None)] if tokens or finish else []


def generation_config(request: dict[str, Any], eos_token_ids: list[int]) -> Any:
    """The runtime's settings of one request, all of them: the checkpoint's generation_config.json has no say."""
    config = load("openvino_genai").GenerationConfig()
    config.apply_chat_template = False
    config.max_new_tokens = request["max_tokens"]
    config.min_new_tokens = request["min_tokens"]
    config.ignore_eos = request["ignore_eos"]
    if eos_token_ids:
        config.eos_token_id = eos_token_ids[0]
        config.stop_token_ids = set() if request["ignore_eos"] else set(eos_token_ids)
    config.do_sample = request["temperature"] > 0
    if config.do_sample:
        config.temperature = request["temperature"]
        config.top_p = request["top_p"]
        config.rng_seed = request["seed"]
        if request["top_k"]:
            config.top_k = request["top_k"]
    return config


def start(config: dict[str, Any]) -> Worker:
    """The runtime over an engine folder, with a cache of fixed size and without reuse of prefixes between requests."""
    load("openvino")
    genai = load("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = config["kv_blocks"]
    scheduler.max_num_seqs = config["max_batch"]
    scheduler.max_num_batched_tokens = max(256, config["max_batch"])
    pipeline = genai.ContinuousBatchingPipeline(config["path"], scheduler, "CPU", config["properties"], {}, {})
    return Worker(
        pipeline,
        blocks=config["kv_blocks"],
        max_batch=config["max_batch"],
        eos_token_ids=config["eos_token_ids"],
    )


class _Lines:
    """JSON lines from a socket: `read(block)` gives what is there, None at its end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._partial = b""

    def read(self, *, block: bool) -> list[dict[str, Any]] | None:
        lines: list[bytes] = []
        while select.select([self._connection], [], [], None if block and not lines else 0)[0]:
            data = self._connection.recv(1 << 20)
            if not data:
                return None
            *whole, self._partial = (self._partial + data).split(b"\n")
            lines += whole
        return [json.loads(line) for line in lines]


def serve(worker: Worker, connection: socket.socket) -> None:
    """Until the server closes its end."""
    lines = _Lines(connection)
    while (messages := lines.read(block=not worker.busy)) is not None:
        for message in messages:
            if "cancel" in message:
                worker.cancel(message["cancel"])
            else:
                worker.add(message)
        events = worker.step()
        if events:
            _send(connection, events)


def main(descriptor: int) -> int:
    os.dup2(2, 1)  # whatever the runtime prints belongs in the log
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server drains, then closes the socket
    with socket.socket(fileno=descriptor) as connection:
        try:
            config = _Lines(connection).read(block=True)
            if config is None:
                return 0
            worker = start(config[0])
            _send(connection, {"ready": True})
            serve(worker, connection)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the server has gone
        except Exception as error:
            traceback.print_exc()
            _send(connection, {"fatal": _first_line(error)})
            return 1
    return 0


def _send(connection: socket.socket, message: Any) -> None:
    connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
