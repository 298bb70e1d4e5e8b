"""An OpenAI-compatible server over a compiled engine.

`check` reads only small files and imports no runtime; `serve` blocks until it is told to stop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from llmopt.errors import BackendMissingError, LlmoptError, SettingsError
from llmopt.serve.folder import EngineFolder
from llmopt.serve.sockets import bind

MAX_BATCH = 64  # sequences that are computed at once; more wait


def check(engine: Path, host: str, port: int) -> None:
    """Raises LlmoptError if `serve` could not start: the folder, the port, the packages."""
    EngineFolder.read(engine)
    for package in ("openvino", "openvino_genai", "openvino_tokenizers", "starlette", "uvicorn", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise BackendMissingError(f"serving needs the package `{package}`", hint="pip install 'llmopt[openvino]'")
    bind(host, port).close()


def serve(
    engine: Path,
    *,
    host: str,
    port: int,
    model_name: str,
    cache_dir: Path | None = None,
    max_batch: int = MAX_BATCH,
    ready: Callable[[str], None],
) -> None:
    """Serve `engine` until SIGINT or SIGTERM, then finish what is in flight and return.

    `port` 0 takes a free one. `ready` is called with the URL once `/health` answers 200. `cache_dir` is where the
    runtime may keep its compiled form of the model; it is made if it is not there. A second signal, or 30 s,
    cuts off what is still in flight (the second signal raises KeyboardInterrupt). Raises LlmoptError if the server
    cannot start.
    """
    if max_batch < 1:
        raise SettingsError(f"`max_batch` must be at least 1, not `{max_batch}`")
    check(engine, host, port)
    if cache_dir is not None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlmoptError(f"cannot make the cache folder `{cache_dir}`: {error.strerror}") from None
    from llmopt.serve.server import run  # starlette and uvicorn

    folder = EngineFolder.read(engine)
    run(folder, bind(host, port), model_name, cache_dir=cache_dir, max_batch=max_batch, ready=ready)
