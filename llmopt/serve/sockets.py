"""The listening socket, bound before anything heavy is loaded."""

from __future__ import annotations

import errno
import socket

from llmopt.errors import LlmoptError, SettingsError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises LlmoptError with what to do about it."""
    if not 0 <= port <= 65535:
        raise SettingsError(f"`{port}` is not a port", hint="ports are from 0 to 65535; `--port 0` takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise LlmoptError(f"`{host}` is not an address of this machine", hint="try `--host 127.0.0.1`") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _refusal(error, host, port) from None
    return listener


def url(listener: socket.socket) -> str:
    """Where a client on this machine finds the listener."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(error: OSError, host: str, port: int) -> LlmoptError:
    if error.errno == errno.EADDRINUSE:
        return LlmoptError(f"port `{port}` on `{host}` is taken", hint="`--port 0` takes a free one")
    if error.errno == errno.EACCES:
        return LlmoptError(f"port `{port}` is for root alone", hint="`--port 0` takes a free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return LlmoptError(f"`{host}` is not an address of this machine", hint="try `--host 127.0.0.1`")
    return LlmoptError(f"cannot listen on `{host}` port `{port}`: {error.strerror}")
