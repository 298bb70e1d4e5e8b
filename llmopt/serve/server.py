"""The life of a server: load the engine, listen, and on a signal finish what is in flight."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer

from llmopt.errors import LlmoptError
from llmopt.models.chat import ChatTemplate
from llmopt.models.companions import read_json
from llmopt.serve.app import Model, build
from llmopt.serve.engine import Engine
from llmopt.serve.folder import EngineFolder
from llmopt.serve.sockets import url
from llmopt.serve.text import Vocabulary

_UVICORN = logging.getLogger("uvicorn.error")
DRAIN_S = 30
_LAST_WORDS_S = 1
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that none is closed under a new request


def run(
    folder: EngineFolder,
    listener: socket.socket,
    model_name: str,
    *,
    cache_dir: Path | None,
    max_batch: int,
    ready: Callable[[str], None],
) -> None:
    """Block until a signal has been obeyed; see `llmopt.serve.serve`."""
    stop = _Stop()
    with listener:
        try:
            asyncio.run(_run(folder, listener, model_name, cache_dir, max_batch, ready, stop))
        finally:
            _UVICORN.disabled = False
    if stop.at_once:
        raise KeyboardInterrupt


async def _run(
    folder: EngineFolder,
    listener: socket.socket,
    model_name: str,
    cache_dir: Path | None,
    max_batch: int,
    ready: Callable[[str], None],
    stop: _Stop,
) -> None:
    with stop.on_signals():
        tokenizer, vocabulary, template = _text_side(folder.path)
        engine = await stop.unless_told(Engine.start(folder, max_batch=max_batch, cache_dir=cache_dir))
        if engine is None:
            return
        try:
            model = Model(
                name=model_name,
                engine=engine,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                template=template,
                vocab_size=folder.vocab_size,
                created=int(time.time()),
            )
            server = _Server(_config(model), lambda: ready(url(listener)))
            stop.serving(server, engine)
            await server.serve(sockets=[listener])
        finally:
            await engine.stop()


def _text_side(path: Path) -> tuple[Tokenizer, Vocabulary, ChatTemplate | None]:
    """What turns text into tokens and back."""
    file = path / "tokenizer.json"
    vocabulary = Vocabulary.from_tokenizer(read_json(file))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the class that tokenizers raises
        raise LlmoptError(f"`{file}` cannot be read: {error}", hint="compile the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, vocabulary, ChatTemplate.read(path)


def _config(model: Model) -> uvicorn.Config:
    return uvicorn.Config(
        build(model),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


class _Server(uvicorn.Server):
    """uvicorn that says when it listens and leaves signals to us: its own way ends in killing the process by them."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """The first SIGINT or SIGTERM ends the server in order, the second at once."""

    def __init__(self) -> None:
        self.at_once = False
        self._loading: asyncio.Task[Engine] | None = None
        self._server: _Server | None = None
        self._engine: Engine | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Obey signals inside the block. Outside the main thread Python gives nobody any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self._obey)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def unless_told(self, start: Coroutine[Any, Any, Engine]) -> Engine | None:
        """The engine, or None when a signal came while it was loading."""
        self._loading = asyncio.create_task(start)
        try:
            return await self._loading
        except asyncio.CancelledError:
            return None
        finally:
            self._loading = None

    def serving(self, server: _Server, engine: Engine) -> None:
        self._server, self._engine = server, engine

    def _obey(self) -> None:
        if self._server is not None and not self._server.should_exit:
            self._server.should_exit = True
            asyncio.get_running_loop().call_later(DRAIN_S, self._cut_off)
            return
        self.at_once = True
        if self._loading is not None:
            self._loading.cancel()
        self._cut_off()

    def _cut_off(self) -> None:
        """End what is in flight with an error reply, and soon after that the replies that nobody reads."""
        if self._engine is not None:
            self._engine.abandon("the server is stopping")
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._force)

    def _force(self) -> None:
        _UVICORN.disabled = True  # it would log the cancelled replies as exceptions
        if self._server is not None:
            self._server.force_exit = True
