"""What can be found wrong before the load: addresses, engine folders, lengths; then whether a server answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmopt.bench.settings import BenchSettings, Subject
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from http.client import HTTPConnection

KEY_VARIABLES = ("LLMOPT_API_KEY", "OPENAI_API_KEY")
KEY_HINT = "put the key in the environment variable `LLMOPT_API_KEY`"
_PROBE_TIMEOUT_S = 10.0


def check(subjects: Mapping[str, Subject], settings: BenchSettings) -> None:
    """Everything that small files and the addresses tell; nothing is sent. Raises LlmoptError."""
    if not subjects:
        raise SettingsError("nothing to bench", hint="give the URL of a server, or an engine")
    for subject in subjects.values():
        if subject.url is not None and subject.engine is not None:
            raise SettingsError(f"`{subject.name}` has both a URL and an engine", hint="give one of them")
        if subject.tokenizer is not None and subject.tokenizer_file is None:
            raise LlmoptError(f"no tokenizer at `{subject.tokenizer}`", hint="give a `tokenizer.json` or its folder")
        if subject.url is not None:
            _check_url(subject.url)
        if subject.engine is not None:
            _check_engine(subject, settings)


def api_key() -> str | None:
    """The key for servers that want one: only ever in a header, never in a report or message."""
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


def redacted(text: str, key: str | None) -> str:
    """`text` without the key, which some servers repeat in their errors."""
    return text.replace(key, "***") if key else text


def base_url(url: str) -> str:
    """The address of the server without a `/v1` at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def probe(url: str, key: str | None, model: str | None) -> str:
    """The model's name as the server at `url` (a base URL) lists it, or `model` where given. Raises LlmoptError."""
    status, answer = _get(base_url(url) + "/v1/models", key)
    if status in (401, 403):
        raise refused_key(url, status, key)
    if model is not None:
        return model
    try:
        name = json.loads(answer)["data"][0]["id"] if status == 200 else None
    except (ValueError, LookupError, TypeError):
        name = None
    if not isinstance(name, str):
        raise LlmoptError(
            f"the server at `{url}` lists no model at `/v1/models` (HTTP {status})",
            hint="name the model with `--model`, and check that the URL is that of an OpenAI-compatible server",
        )
    return name


def refused_key(url: str, status: int, key: str | None) -> LlmoptError:
    """What to say of a 401 or 403."""
    if key is None:
        return LlmoptError(f"the server at `{url}` wants a key (HTTP {status})", hint=KEY_HINT)
    return LlmoptError(f"the server at `{url}` refuses the key (HTTP {status})", hint=f"{KEY_HINT}, one valid there")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(f"`{url}` is not the URL of a server", hint="write it as `http://127.0.0.1:8000`")
    if parts.username is not None or parts.password is not None:
        raise SettingsError("a URL with a user or password in it would end up in the report", hint=KEY_HINT)
    if parts.query or parts.fragment or not url.isascii() or any(c.isspace() for c in url):
        raise SettingsError(f"`{url}` has more than a server's address", hint="write it as `http://127.0.0.1:8000`")


def _check_engine(subject: Subject, settings: BenchSettings) -> None:
    assert subject.engine is not None
    file = subject.engine / "engine.json"
    hint = "make one with `llmopt compile`"
    if not subject.engine.is_dir():
        raise LlmoptError(f"no engine folder at `{subject.engine}`", hint=hint)
    try:
        fields: Any = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise LlmoptError(f"`{subject.engine}` is not an engine: it has no `engine.json`", hint=hint) from None
    except ValueError as error:
        raise LlmoptError(f"`{file}` is not JSON: {error}", hint=hint) from None
    room = fields.get("max_context_tokens") if isinstance(fields, dict) else None
    needed = settings.prompt_tokens + settings.output_tokens
    if isinstance(room, int) and needed > room:
        raise SettingsError(
            f"prompts of {settings.prompt_tokens} and outputs of {settings.output_tokens} tokens do not fit into the "
            f"{room} tokens of context of `{subject.name}`",
            hint="lower `prompt_tokens` or `output_tokens`",
        )


def _get(url: str, key: str | None) -> tuple[int, bytes]:
    import ssl
    from http.client import HTTPException

    parts = urlsplit(url)
    connection = _connection(parts.scheme, parts.hostname or "", parts.port)
    try:
        connection.request("GET", parts.path, headers={"authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        raise LlmoptError(
            f"the server at `{url}` does not answer within {_PROBE_TIMEOUT_S:g} s", hint="is it still loading?"
        ) from None
    except ssl.SSLError as error:
        raise LlmoptError(
            f"no TLS connection to `{url}`: {error.reason or error}", hint="check the certificate, or use `http://`"
        ) from None
    except OSError as error:
        raise LlmoptError(
            f"cannot reach `{url}`: {error.strerror or error}", hint="does the server run, and are host and port right?"
        ) from None
    except HTTPException as error:
        raise LlmoptError(f"the server at `{url}` does not speak HTTP: {error!r}", hint="check the port") from None
    finally:
        connection.close()


def _connection(scheme: str, host: str, port: int | None) -> HTTPConnection:
    from http.client import HTTPConnection, HTTPSConnection

    kind = HTTPSConnection if scheme == "https" else HTTPConnection
    return kind(host, port, timeout=_PROBE_TIMEOUT_S)
