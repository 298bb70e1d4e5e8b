"""From the stored bytes of an exchange to what its client saw: one record a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt.bench.client.base import Exchange, Failure
from llmopt.bench.client.wire import Response, events
from llmopt.bench.endpoints import Endpoint

_MAX_DETAIL = 300


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Stamps are nanoseconds of the monotonic clock, one for each chunk of the stream that has text.

    A failed request keeps the chunks it got. Token counts are the server's, None where it sends no usage.
    """

    prompt: int
    status: int  # of HTTP; 0 where none came
    sent_ns: int
    end_ns: int
    stamps_ns: tuple[int, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    streamed: bool
    failure: Failure | None

    @property
    def tokens(self) -> int:
        """Tokens by the server's usage, else chunks."""
        return len(self.stamps_ns) if self.completion_tokens is None else self.completion_tokens


class _BadAnswerError(Exception):
    """An answer that is not what the endpoint promises; carries its failure class."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.failure = Failure(kind, detail)


class _Reading:
    """The fields of a record while its events are read."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.stamps_ns: list[int] = []
        self.usage: Mapping[str, Any] = {}
        self.finished = False
        self.streamed = True

    def read(self, response: Response) -> None:
        if not 200 <= response.status < 300:
            detail = f"HTTP {response.status}: {_reason(response)}"
            raise _BadAnswerError(f"http_{response.status // 100}xx", detail)
        self.streamed = "text/event-stream" in response.headers.get("content-type", "").lower()
        if self.streamed:
            for stamp_ns, data in events(response.pieces):
                self._read_event(stamp_ns, data)
        elif response.pieces:
            self._read_object(response.pieces[-1][0], response.body(), whole=True)
        if not response.complete:
            return  # the failure of the exchange says why
        if not self.finished and self.streamed:
            raise _BadAnswerError("cut", "the stream ended without `[DONE]`, finish reason or usage")
        if not self.stamps_ns:
            raise _BadAnswerError("empty", "an answer without any text")

    def _read_event(self, stamp_ns: int, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = True
        elif data:
            self._read_object(stamp_ns, data, whole=False)

    def _read_object(self, stamp_ns: int, data: bytes, *, whole: bool) -> None:
        try:
            fields = json.loads(data)
        except ValueError as error:  # not JSON, or not UTF-8
            raise _BadAnswerError("malformed", f"not JSON ({error}): {_shown(data)}") from None
        try:
            if problem := fields.get("error"):
                raise _BadAnswerError("server_error", f"an error in the stream: {_message(problem)}")
            if usage := fields.get("usage"):
                self.usage = {**usage}
                self.finished = True
            choices = fields.get("choices") or ()
            if choices:
                read = self.endpoint.whole if whole else self.endpoint.text
                if read(choices[0]):
                    self.stamps_ns.append(stamp_ns)
                if choices[0].get("finish_reason"):
                    self.finished = True
        except (AttributeError, KeyError, TypeError):
            raise _BadAnswerError("malformed", f"not an OpenAI-style answer: {_shown(data)}") from None

    def count(self, name: str) -> int | None:
        value = self.usage.get(name)
        return value if isinstance(value, int) else None


def read(exchange: Exchange, endpoint: Endpoint) -> Record:
    """Parse one exchange; whatever its bytes are, the result is a record and never an exception."""
    reading = _Reading(endpoint)
    failure = exchange.failure
    if exchange.response is not None and exchange.response.status:
        try:
            reading.read(exchange.response)
        except _BadAnswerError as bad:
            failure = failure or bad.failure
    return Record(
        prompt=exchange.job.prompt,
        status=exchange.response.status if exchange.response is not None else 0,
        sent_ns=exchange.sent_ns,
        end_ns=exchange.end_ns,
        stamps_ns=tuple(reading.stamps_ns),
        prompt_tokens=reading.count("prompt_tokens"),
        completion_tokens=reading.count("completion_tokens"),
        streamed=reading.streamed,
        failure=failure,
    )


def _reason(response: Response) -> str:
    """What the server says about its error."""
    body = response.body()
    try:
        fields = json.loads(body)
        return _message(fields.get("error") or fields.get("detail") or fields)
    except (ValueError, AttributeError):
        return _shown(body)


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or error)[:_MAX_DETAIL]


def _shown(data: bytes) -> str:
    return repr(data[:80])[2:-1] + ("..." if len(data) > 80 else "")
