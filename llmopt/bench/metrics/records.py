"""From the stored bytes of an exchange to what its client saw: one record a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from llmopt.bench.answers import Answer, message, shown
from llmopt.bench.client.base import Exchange, Failure
from llmopt.bench.client.wire import Response
from llmopt.bench.endpoints import ENDPOINTS

UNSENT = "unsent"

#: What can become of a request that has no answer.
CLASSES: Mapping[str, str] = {
    "refused": "no connection: the host is unknown, nothing listens, or it does not let us in",
    "tls": "a connection, but no agreement on its encryption, or a certificate that is not trusted",
    "timeout": "no connection, or no end of the answer, within its time",
    "cut": "the server closed the connection, or ended its stream, before the answer was complete",
    "malformed": "bytes that are not HTTP, not UTF-8, not JSON, or not an answer of the endpoint",
    "empty": "a complete answer without any text",
    "server_error": "an error that the server reports inside its answer",
    "interrupted": "still in flight when the load was stopped by hand",
    UNSENT: "due in an open loop, but the limit of requests in flight was reached until its end",
    "http_401": "the key is missing or wrong",
    "http_403": "the key does not allow it",
    "http_429": "too many requests: the server limits their rate",
    "http_3xx": "a redirect, which is not followed",
    "http_4xx": "any other request that the server does not take",
    "http_5xx": "an error of the server",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Stamps are nanoseconds of the monotonic clock, one for each chunk of the stream that has output.

    A failed request keeps the chunks it got. Token counts are the server's, None where it sends none.
    """

    prompt: int  # index of the item in the workload
    status: int  # of HTTP; 0 where none came
    sent_ns: int
    end_ns: int
    stamps_ns: Sequence[int]
    prompt_tokens: int | None
    completion_tokens: int | None
    streamed: bool
    failure: Failure | None
    turn: int = 0  # of its conversation
    target: int = 0  # index of the URL
    due_ns: int | None = None  # when it was to be sent, where that was set before
    answer_ns: int | None = None  # the first chunk that is not reasoning
    cached_tokens: int | None = None  # of the prompt, from the server's prefix cache
    wanted_tokens: int | None = None  # output that was asked for
    finish: str | None = None  # why the output ended, in the server's word

    @property
    def tokens(self) -> int:
        """Output tokens by the server's usage, else chunks."""
        return len(self.stamps_ns) if self.completion_tokens is None else self.completion_tokens


def read(exchange: Exchange, endpoint: str) -> Record:
    """Parse one exchange with the endpoint of that name; whatever its bytes are, the result is a record."""
    answer, failure = Answer(), exchange.failure
    response = exchange.response
    if response is not None and 200 <= response.status < 300:
        answer = ENDPOINTS[endpoint].read(response)
        failure = failure or answer.failure
    elif response is not None and response.status:
        failure = failure or _http_failure(response)
    job = exchange.job
    return Record(
        prompt=job.prompt,
        status=response.status if response is not None else 0,
        sent_ns=exchange.sent_ns,
        end_ns=exchange.end_ns,
        stamps_ns=answer.stamps_ns,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        streamed=answer.streamed,
        failure=failure,
        turn=job.turn,
        target=job.target,
        due_ns=exchange.due_ns,
        answer_ns=answer.answer_ns,
        cached_tokens=answer.cached_tokens,
        wanted_tokens=job.wanted_tokens,
        finish=answer.finish,
    )


def _http_failure(response: Response) -> Failure:
    kind = f"http_{response.status}"
    detail = f"HTTP {response.status}: {_reason(response)}"
    if wait := response.headers.get("retry-after"):
        detail += f" (Retry-After: {wait[:40]})"
    return Failure(kind if kind in CLASSES else f"http_{response.status // 100}xx", detail)


def _reason(response: Response) -> str:
    """What the server says about its error."""
    body = response.body()
    try:
        fields = orjson.loads(body)
        return message(fields.get("error") or fields.get("detail") or fields)
    except (ValueError, AttributeError):
        return shown(body)
