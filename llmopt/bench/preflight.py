"""What can be found wrong before the load: addresses, engine folders, lengths; then whether a server answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmopt.bench.endpoints import ENDPOINTS
from llmopt.bench.report.folder import read_report
from llmopt.bench.settings import BenchSettings, Subject, header_of
from llmopt.errors import LlmoptError, MeasurementInvalidError, SettingsError

if TYPE_CHECKING:
    from http.client import HTTPConnection

KEY_VARIABLES = ("LLMOPT_API_KEY", "OPENAI_API_KEY")
KEY_HINT = "put the key in the environment variable `LLMOPT_API_KEY`"
_PROBE_TIMEOUT_S = 10.0


def check(subjects: Mapping[str, Subject], settings: BenchSettings, baseline: Path | None = None) -> None:
    """Everything that small files and the addresses tell; nothing is sent. Raises LlmoptError.

    `baseline` is a stored report.
    """
    if not subjects:
        raise SettingsError("nothing to bench", hint="give the URL of a server, or an engine")
    check_gate(settings, compared=len(subjects) > 1 or baseline is not None)
    if len(subjects) > 1 and baseline is not None:
        raise SettingsError("a baseline is loaded, and a stored one given", hint="leave out one of the two")
    if len(subjects) > 1 and settings.sweep is not None:
        raise SettingsError("`sweep` searches with one subject", hint="sweep first, then compare at one level")
    if baseline is not None:
        _check_baseline(read_report(baseline), settings)
    if settings.in_process and any(subject.engine is None for subject in subjects.values() if subject.url):
        raise SettingsError("a server at a URL cannot be measured without HTTP", hint="give an engine")
    header_names = [name for name, _ in headers_of(settings)]
    if len(set(header_names)) < len(header_names):
        raise SettingsError("a header is given twice", hint="give each once")
    for subject in subjects.values():
        if subject.url is not None and subject.engine is not None:
            raise SettingsError(f"`{subject.name}` has both a URL and an engine", hint="give one of them")
        if subject.tokenizer is not None and subject.tokenizer_file is None:
            raise LlmoptError(f"no tokenizer at `{subject.tokenizer}`", hint="give a `tokenizer.json` or its folder")
        if subject.url is not None and not subject.urls:
            raise SettingsError("an empty URL", hint="write it as `http://127.0.0.1:8000`")
        for url in subject.urls:
            _check_url(url)
        if subject.engine is not None:
            _check_engine(subject, settings)


def _check_baseline(report: Mapping[str, Any], settings: BenchSettings) -> None:
    """A stored report can be a baseline for these levels, as far as they are known."""
    if report.get("valid") is False:
        why = report.get("invalid_because") or "its measurement is not valid"
        raise MeasurementInvalidError(f"the baseline report cannot be used: {why}", hint="measure it again")
    if settings.sweep is not None:
        raise SettingsError("`sweep` finds its own levels, which a baseline does not have", hint="give a level of it")
    theirs = report["results"].get("candidate", {})
    ours = [load.label for load in settings.loads(timed="trace" in theirs)]
    if not set(ours) & set(theirs):
        raise SettingsError(
            f"the baseline report was measured at {', '.join(theirs) or 'no level'}, not at {', '.join(ours)}",
            hint="measure at a level of the baseline",
        )


def check_gate(settings: BenchSettings, *, compared: bool) -> None:
    """A gate needs something to compare with."""
    if settings.gate and not compared:
        raise SettingsError(
            "`gate` has nothing to compare with",
            hint="give `--against` an engine or a URL, or `--baseline` a report; thresholds need no `--gate`",
        )


def headers_of(settings: BenchSettings) -> tuple[tuple[str, str], ...]:
    """What goes with every request to a server at a URL: the key of the environment, and the settings' own headers."""
    own = tuple(header_of(header) for header in settings.headers)
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    if key is None or any(name == "authorization" for name, _ in own):
        return own
    return (("authorization", f"Bearer {key}"), *own)


def secrets_of(headers: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """What of the headers must not be repeated: the key, and every value that came from the environment."""
    return tuple(value.removeprefix("Bearer ") for _, value in headers if len(value) > 3)


def redacted(text: str, secrets: Sequence[str]) -> str:
    """`text` without the secrets, which some servers repeat in their errors."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def base_url(url: str) -> str:
    """The address of the server without a `/v1` at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def probe(url: str, headers: Sequence[tuple[str, str]], settings: BenchSettings) -> str:
    """The model's name as the server at `url` (a base URL) lists it, or that of the settings. Raises LlmoptError.

    A server that does not speak OpenAI's protocol lists none; that something answers at its address is all it is asked.
    """
    endpoint = ENDPOINTS[settings.endpoint]
    status, answer = _get(base_url(url) + "/v1/models", headers)
    if status in (401, 403):
        raise refused_key(url, status, any(name == "authorization" for name, _ in headers))
    if settings.model is not None:
        return settings.model
    try:
        name = json.loads(answer)["data"][0]["id"] if status == 200 else None
    except (ValueError, LookupError, TypeError):
        name = None
    if isinstance(name, str):
        return name
    if not endpoint.names_model:
        return "unnamed"
    raise LlmoptError(
        f"the server at `{url}` lists no model at `/v1/models` (HTTP {status})",
        hint="name the model with `--model`, and check that the URL is that of an OpenAI-compatible server",
    )


def refused_key(url: str, status: int, has_key: bool) -> LlmoptError:
    """What to say of a 401 or 403."""
    if not has_key:
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
    if isinstance(fields, dict) and fields.get("target", "openvino") != "openvino":
        raise LlmoptError(
            f"the engine `{subject.name}` is for `{fields['target']}`, which cannot be served here",
            hint="run its `serve.sh` where its GPU is and give the server's URL, or compile for `openvino`",
        )
    room = fields.get("max_context_tokens") if isinstance(fields, dict) else None
    needed = settings.workload.most_tokens
    if isinstance(room, int) and needed is not None and needed > room:
        raise SettingsError(
            f"prompts and outputs of {needed} tokens in all do not fit into the {room} tokens of context of "
            f"`{subject.name}`",
            hint="lower `prompt_tokens` or `output_tokens`",
        )


def _get(url: str, headers: Sequence[tuple[str, str]]) -> tuple[int, bytes]:
    import ssl
    from http.client import HTTPException

    parts = urlsplit(url)
    connection = _connection(parts.scheme, parts.hostname or "", parts.port)
    try:
        connection.request("GET", parts.path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        more = ", or does it want `http://`?" if parts.scheme == "https" else "?"
        raise LlmoptError(
            f"the server at `{url}` does not answer within {_PROBE_TIMEOUT_S:g} s", hint=f"is it still loading{more}"
        ) from None
    except ssl.SSLError as error:
        raise LlmoptError(
            f"no TLS connection to `{url}`: {error.reason or error}",
            hint="check the certificate, name its authority in `SSL_CERT_FILE`, or use `http://`",
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
