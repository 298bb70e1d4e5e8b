"""A server that knows the truth: it streams at set times and logs its own, and it can misbehave in every way we name.

Run as a program. The first segment of a URL's path says how to behave: `http://HOST:PORT/ttft=20,gap=5,newline=crlf`;
the program's own arguments say it for URLs without. `GET /log` gives what was sent when, by the monotonic clock that
all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping

LOG: list[dict[str, object]] = []

WORDS = ["alpha", " beta", " gamma", ' "delta"', " \\epsilon", " \u03b6\u03b7\u03c4\u03b1", " data:", "\n\n"]

BAD_EVENTS = {"json": b"{not json", "utf8": b'{"text": "\xff\xfe"}', "shape": b"[1, 2]"}


class Behaviour:
    """Times in milliseconds; counts in tokens."""

    def __init__(self, text: str) -> None:
        self.options = dict(part.partition("=")[::2] for part in text.split(",") if part)
        self.newline = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}[self.options.get("newline", "lf")]

    def number(self, name: str, default: float = 0) -> float:
        return float(self.options.get(name, default))

    def has(self, name: str) -> bool:
        return name in self.options


class Handler:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, default: str) -> None:
        self.reader, self.writer, self.default = reader, writer, default
        self.requests = 0

    async def serve(self) -> None:
        try:
            while await self.one():
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writer.close()

    async def one(self) -> bool:
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return False
        method, path, _ = head.split("\r\n")[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.split("\r\n")[1:])}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        received_ns = time.monotonic_ns()
        self.requests += 1
        first = path.split("/")[1]
        mode = Behaviour(first if first not in ("v1", "log", "plain") else self.default)
        if path == "/log":
            return await self.simple(200, json.dumps(LOG))
        if method == "GET":
            status = int(mode.number("models_status", 200))
            return await self.simple(status, json.dumps({"data": [{"id": "truth"}]}))
        if mode.has("idle_close") and self.requests > 1:  # as when a keep-alive time ended just now
            return False
        return await self.generate(mode, json.loads(body), headers, received_ns, path)

    async def simple(self, status: int, text: str, kind: str = "application/json", more: str = "") -> bool:
        data = text.encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n{more}\r\n"
        self.writer.write(head.encode() + data)
        await self.writer.drain()
        return True

    async def generate(
        self, mode: Behaviour, request: dict[str, object], headers: Mapping[str, str], received_ns: int, path: str
    ) -> bool:
        prompt = request.get("prompt") or request["messages"][0]["content"]
        entry: dict[str, object] = {"prompt": prompt, "received_ns": received_ns, "sent_ns": [], "request": request}
        entry["connection"] = str(self.writer.get_extra_info("peername")[1])
        entry["authorization"] = headers.get("authorization")
        LOG.append(entry)
        if status := int(mode.number("status")):
            key = (entry["authorization"] or "none").split(" ")[-1]
            wait = f"retry-after: {mode.options['retry_after']}\r\n" if mode.has("retry_after") else ""
            text = json.dumps({"error": {"message": f"status {status}, key {key}"}})
            return await self.simple(status, text, more=wait)
        if mode.has("every") and len(LOG) % int(mode.number("every")) == 0:
            return await self.simple(500, json.dumps({"error": {"message": "now and then"}}))
        if mode.has("html"):
            return await self.simple(200, "<html>", "text/html")
        tokens = int(mode.number("tokens", int(request["max_tokens"])))
        if mode.has("whole"):
            text = "".join(WORDS[i % len(WORDS)] for i in range(tokens))
            choice = {"text": text, "message": {"content": text}, "finish_reason": "length"}
            return await self.simple(200, json.dumps({"choices": [choice], "usage": self.usage(mode, request, tokens)}))
        return await Stream(self.writer, mode, chat=path.endswith("chat/completions"), log=entry["sent_ns"]).send(
            tokens, self.usage(mode, request, tokens)
        )

    def usage(self, mode: Behaviour, request: dict[str, object], tokens: int) -> dict[str, int]:
        return {"prompt_tokens": int(mode.number("prompt_tokens", 7)), "completion_tokens": tokens}


class Stream:
    def __init__(self, writer: asyncio.StreamWriter, mode: Behaviour, *, chat: bool, log: object) -> None:
        self.writer, self.mode, self.chat = writer, mode, chat
        assert isinstance(log, list)
        self.log = log

    async def send(self, tokens: int, usage: dict[str, int]) -> bool:
        mode = self.mode
        framing = mode.options.get("framing", "chunked")
        kind = {"chunked": "transfer-encoding: chunked\r\n", "close": ""}[framing]
        if mode.has("interim"):
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if mode.has("garbage"):
            self.writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            return False
        self.writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n{kind}\r\n".encode())
        if mode.has("role"):
            await self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, logged=False)
        due = time.monotonic() + mode.number("ttft") / 1e3
        together = int(mode.number("together", 1))
        for i in range(0, tokens, together):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += mode.number("gap") / 1e3
            if self.writer.transport.is_closing():  # the client has gone
                return False
            if await self.misbehave(i):
                return False
            text = "".join(WORDS[j % len(WORDS)] for j in range(i, min(tokens, i + together)))
            await self.event({"choices": [self.choice(text)]})
        return await self.finish(usage)

    async def misbehave(self, i: int) -> bool:
        mode = self.mode
        if mode.has("die") and i >= mode.number("die"):
            print("fatal: the device is gone", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if mode.has("hang") and i >= mode.number("hang"):
            await asyncio.sleep(60)
        if mode.has("cut") and i >= mode.number("cut"):
            return True
        if i == 1:
            bad = mode.options.get("bad", "")
            if bad in BAD_EVENTS:
                self.write(b"data: " + BAD_EVENTS[bad] + b"\n\n")
            if bad == "chunk":
                self.writer.write(b"zz\r\nhello\r\n")
            if bad == "error":
                await self.event({"error": {"message": "out of memory"}}, logged=False)
        return False

    def choice(self, text: str) -> dict[str, object]:
        if not self.chat:
            return {"index": 0, "text": text, "finish_reason": None}
        name = "reasoning_content" if self.mode.has("reasoning") else "content"
        return {"index": 0, "delta": {name: text}, "finish_reason": None}

    async def event(self, fields: object, *, logged: bool = True) -> None:
        comment = f": ping{self.mode.newline}{self.mode.newline}" if self.mode.has("comments") else ""
        text = f"{comment}data: {json.dumps(fields, ensure_ascii=False)}{self.mode.newline * 2}"
        if logged:
            self.log.append(time.monotonic_ns())
        self.write(text.encode())
        if self.writer.transport.get_write_buffer_size() > 1 << 16:
            await self.writer.drain()

    def write(self, data: bytes) -> None:
        if self.mode.options.get("framing", "chunked") == "chunked":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        step = int(self.mode.number("split", len(data)))
        for start in range(0, len(data), step):
            self.writer.write(data[start : start + step])

    async def finish(self, usage: dict[str, int]) -> bool:
        if not self.mode.has("nousage"):
            await self.event({"choices": [], "usage": usage}, logged=False)
        if not self.mode.has("nodone"):
            self.write(f"data: [DONE]{self.mode.newline * 2}".encode())
        if self.mode.options.get("framing", "chunked") == "chunked":
            self.writer.write(b"0\r\n\r\n")
            await self.writer.drain()
            return not self.mode.has("onebyone")
        await self.writer.drain()
        return False


async def main() -> None:
    default = sys.argv[1] if len(sys.argv) > 1 else ""
    mode = Behaviour(default)
    if mode.has("broken"):
        print("loading\nRuntimeError: no such device: NPU", file=sys.stderr)
        sys.exit(3)
    if mode.has("slow"):
        await asyncio.sleep(60)
    if mode.has("child"):
        import subprocess

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Handler(reader, writer, default).serve()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1024)
    print(f"pid {os.getpid()}", flush=True)
    print(f"ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    if not mode.has("stubborn"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
