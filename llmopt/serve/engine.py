"""The server's side of the engine process: start it, hand requests over, pass tokens on to whoever waits for them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llmopt.errors import LlmoptError
from llmopt.serve.folder import BLOCK_TOKENS, EngineFolder, available_bytes
from llmopt.serve.protocol import Sampling

log = logging.getLogger("llmopt.serve")

_LINE_LIMIT = 1 << 24  # bytes of one message; a step of 1,000 sequences needs some 20,000


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step brought to the prompt `index` of a request. `finish` is None, "stop" or "length"."""

    index: int
    tokens: Sequence[int]
    finish: str | None = None
    error: str | None = None


Events: TypeAlias = "asyncio.Queue[Tokens | None]"


class Engine:
    """A running engine process. Nothing here waits for the runtime's computation."""

    def __init__(
        self, process: asyncio.subprocess.Process, writer: asyncio.StreamWriter, max_context_tokens: int
    ) -> None:
        self.max_context_tokens = max_context_tokens
        self.failure: str | None = None  # why it cannot serve any more
        self._process = process
        self._writer = writer
        self._reading: asyncio.Task[None] | None = None
        self._live: dict[int, tuple[Events, int]] = {}
        self._last_id = 0
        self._stopping = False

    @classmethod
    async def start(cls, folder: EngineFolder, *, max_batch: int, cache_dir: Path | None) -> Engine:
        """Returns once the model is loaded. Raises LlmoptError if it cannot be."""
        blocks = folder.kv_blocks(max_batch, available_bytes())
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await _spawn(theirs)
            reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT)
        except BaseException:
            ours.close()  # which ends the process
            raise
        engine = cls(process, writer, min(folder.max_context_tokens, (blocks - 1) * BLOCK_TOKENS))
        try:
            engine._send(folder.configuration(blocks, max_batch, cache_dir))
            await engine._loaded(reader)
        except BaseException:
            await engine.stop()
            raise
        engine._reading = asyncio.create_task(engine._read(reader))
        return engine

    def submit(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, index: int, events: Events) -> int:
        """Queue a prompt; its tokens come as `Tokens` with this `index`. Returns the id for `cancel`."""
        self._last_id += 1
        if self.failure:
            events.put_nowait(Tokens(index, (), error=self.failure))
            return self._last_id
        self._live[self._last_id] = (events, index)
        request = dataclasses.asdict(sampling) | {"max_tokens": max_tokens}
        self._send({"add": self._last_id, "tokens": list(prompt), **request})
        return self._last_id

    def cancel(self, id_: int) -> None:
        """Free what the request holds. Nothing comes after this; a finished one is left alone."""
        if self._live.pop(id_, None) and not self.failure:
            self._send({"cancel": id_})

    def abandon(self, reason: str) -> int:
        """Answer every request in flight, and every one to come, with `reason`. Returns how many were in flight."""
        self.failure = reason
        live, self._live = self._live, {}
        for events, index in live.values():
            events.put_nowait(Tokens(index, (), error=reason))
        return len(live)

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._stopping = True
        self._writer.close()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _loaded(self, reader: asyncio.StreamReader) -> None:
        line = await reader.readline()
        reply = json.loads(line) if line else {"fatal": f"its process ended with {await self._process.wait()}"}
        if "fatal" in reply:
            message = f"the engine could not be loaded: {reply['fatal']}"
            raise LlmoptError(message, hint="compile it again on this machine")

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Pass every step's tokens on, until the process ends."""
        reason = "the engine process ended"
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if isinstance(message, dict):
                    reason = message["fatal"]
                    continue
                for id_, tokens, finish, error in message:
                    self._deliver(id_, tokens, finish, error)
        except ConnectionError:
            pass
        if not self._stopping:
            reason = f"the engine failed: {reason}"
            count = self.abandon(reason)
            log.error("%s (exit code %s, %d requests in flight)", reason, await self._process.wait(), count)

    def _deliver(self, id_: int, tokens: Sequence[int], finish: str | None, error: str | None) -> None:
        live = self._live.get(id_)
        if live is None:  # cancelled while this step was computed
            return
        events, index = live
        if finish or error:
            del self._live[id_]
        if error:
            log.error("request %d: %s", id_, error)
        events.put_nowait(Tokens(index, tokens, finish, error))


async def _spawn(connection: socket.socket) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llmopt.serve.worker", str(connection.fileno())),
        pass_fds=[connection.fileno()],
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is for the server alone
    )
