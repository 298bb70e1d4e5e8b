"""What comes back from an endpoint: a stream of events or a whole answer, read after the load.

Each endpoint has one function that takes an event apart; the rest is the same for all. Whatever the bytes are, the
result is an `Answer`, with a failure where they are not what the endpoint promises. Sources: OpenAI's API reference
(chat, completions, responses); vLLM's `reasoning_content` and `reasoning`; Triton's generate extension, and the
additional outputs of its vLLM backend; the Messages of text-generation-inference; the schema of DJL's LMI containers.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import orjson

from llmopt.bench.client.base import Failure
from llmopt.bench.client.wire import Piece, Response, events

_MAX_DETAIL = 300
_LINES = ("jsonlines", "ndjson", "jsonl")  # content types of one JSON object a line


class Answer:
    """One answer while it is read. Stamps are nanoseconds of the monotonic clock, one for each chunk with output.

    Reasoning, refusals and the arguments of tool calls are output: a client waits for them and the server counts them.
    """

    __slots__ = (
        "answer_ns", "cached_tokens", "completion_tokens", "ended", "failure", "finish", "prompt_tokens", "stamps_ns",
        "streamed", "texts",
    )  # fmt: skip

    def __init__(self) -> None:
        self.stamps_ns = array("q")
        self.answer_ns: int | None = None  # the first chunk that is not reasoning
        self.texts: list[str] = []  # without reasoning
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish: str | None = None
        self.ended = False  # the stream has said that it is complete
        self.streamed = False
        self.failure: Failure | None = None

    def say(self, stamp_ns: int, text: str) -> None:
        """A chunk with text for the user."""
        if not isinstance(text, str):
            raise TypeError("text that is not a string")
        if not self.texts:
            self.answer_ns = stamp_ns
        self.texts.append(text)
        self.stamps_ns.append(stamp_ns)

    def think(self, stamp_ns: int) -> None:
        """A chunk of reasoning."""
        self.stamps_ns.append(stamp_ns)

    def end(self, finish: str | None) -> None:
        self.ended = True
        if finish is not None:
            self.finish = str(finish)[:_MAX_DETAIL]


#: Takes one event apart: (answer, stamp of the receive that completed the event, its JSON object).
Take: TypeAlias = Callable[[Answer, int, Any], None]


class _ServerError(Exception):
    """An error that the server reports inside its answer."""


def read(response: Response, take: Take, *, says_end: bool) -> Answer:
    """Read the body of an answer whose status is 200. `says_end`: a stream without a word on its end was cut."""
    answer = Answer()
    kind = response.headers.get("content-type", "").lower()
    if "text/event-stream" in kind:
        answer.streamed = True
        found = events(response)
    elif any(name in kind for name in _LINES):
        answer.streamed = True
        found = _lines(response)
    else:
        found = [(stamp_ns, response.body()) for stamp_ns in response.stamps_ns[-1:]]
    _take_all(answer, take, found)
    if answer.failure is None and response.complete:  # else the failure of the exchange says why
        if answer.streamed and says_end and not answer.ended:
            answer.failure = Failure("cut", "the stream ended without `[DONE]`, finish reason or usage")
        elif not answer.stamps_ns:
            answer.failure = Failure("empty", "an answer without any text")
    return answer


def _take_all(answer: Answer, take: Take, found: Sequence[Piece]) -> None:
    """All events, up to the first that is not what it should be."""
    loads = orjson.loads
    data = b""
    try:
        for stamp_ns, data in found:
            if data == b"[DONE]":
                answer.ended = True
            elif data:
                take(answer, stamp_ns, loads(data))
    except orjson.JSONDecodeError as error:  # bytes that are not UTF-8, too
        answer.failure = Failure("malformed", f"not JSON ({error}): {shown(data)}")
    except _ServerError as error:
        answer.failure = Failure("server_error", f"an error in the stream: {error}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        answer.failure = Failure("malformed", f"not an answer of this endpoint: {shown(data)}")


def _lines(response: Response) -> list[Piece]:
    """Every line with the stamp of the receive that completed it; the last may lack its end."""
    if not response.stamps_ns:
        return []
    lines = response.body().removesuffix(b"\n").split(b"\n")
    ends = list(accumulate([len(line) + 1 for line in lines]))
    ends[-1] = len(response.body())
    return [(stamp_ns, line.strip()) for stamp_ns, line in zip(response.stamps_at(ends), lines, strict=True)]


def take_chat(answer: Answer, stamp_ns: int, event: Any) -> None:
    """A chunk of OpenAI's chat completions, or a whole one."""
    if choices := event.get("choices"):
        choice = choices[0]
        delta = choice.get("delta") or choice.get("message") or _NOTHING
        if text := delta.get("content") or delta.get("refusal"):
            answer.say(stamp_ns, text)
        elif delta.get("reasoning_content") or delta.get("reasoning"):
            answer.think(stamp_ns)
        elif delta.get("tool_calls"):
            answer.say(stamp_ns, "")
        if finish := choice.get("finish_reason"):
            answer.end(finish)
    _take_openai_rest(answer, event)


def take_completion(answer: Answer, stamp_ns: int, event: Any) -> None:
    """A chunk of OpenAI's completions, or a whole one."""
    if choices := event.get("choices"):
        choice = choices[0]
        if text := choice.get("text"):
            answer.say(stamp_ns, text)
        if finish := choice.get("finish_reason"):
            answer.end(finish)
    _take_openai_rest(answer, event)


def _take_openai_rest(answer: Answer, event: Mapping[str, Any]) -> None:
    if usage := event.get("usage"):
        _count(answer, usage, "prompt_tokens", "completion_tokens")
        answer.end(None)
    if error := event.get("error"):
        raise _ServerError(message(error))


def take_response(answer: Answer, stamp_ns: int, event: Any) -> None:
    """An event of OpenAI's responses, or a whole one."""
    kind = event.get("type")
    if kind is None:
        _take_whole_response(answer, stamp_ns, event)
    elif kind in _SPOKEN:
        if text := event["delta"]:
            answer.say(stamp_ns, text if kind == "response.output_text.delta" else "")
    elif kind.startswith("response.reasoning") and kind.endswith(".delta"):
        if event["delta"]:
            answer.think(stamp_ns)
    elif kind in ("response.completed", "response.incomplete"):
        _end_response(answer, event["response"])
    elif kind in ("response.failed", "error"):
        raise _ServerError(message((event.get("response") or event).get("error") or event))


_SPOKEN = frozenset(
    ("response.output_text.delta", "response.refusal.delta", "response.function_call_arguments.delta")
)  # fmt: skip


def _take_whole_response(answer: Answer, stamp_ns: int, response: Mapping[str, Any]) -> None:
    if error := response.get("error"):
        raise _ServerError(message(error))
    for item in response.get("output") or ():
        for part in item.get("content") or ():
            if item.get("type") == "reasoning":
                answer.think(stamp_ns)
            elif text := part.get("text"):
                answer.say(stamp_ns, text)
    _end_response(answer, response)


def _end_response(answer: Answer, response: Mapping[str, Any]) -> None:
    why = response.get("incomplete_details") or _NOTHING
    answer.end({"max_output_tokens": "length"}.get(why.get("reason", ""), why.get("reason")) or "stop")
    if usage := response.get("usage"):
        _count(answer, usage, "input_tokens", "output_tokens")


def take_triton(answer: Answer, stamp_ns: int, event: Any) -> None:
    """A response of Triton's generate extension; its backends count the output tokens of each response by itself."""
    if error := event.get("error"):
        raise _ServerError(message(error))
    text = event.get("text_output")
    if text := "".join(text) if isinstance(text, list) else text:
        answer.say(stamp_ns, text)
    if (count := _whole(event.get("num_output_tokens"))) is not None:
        answer.completion_tokens = (answer.completion_tokens or 0) + count
    if (count := _whole(event.get("num_input_tokens"))) is not None:
        answer.prompt_tokens = count
    if (finish := event.get("finish_reason")) not in (None, "", "None"):
        answer.end(finish)


def take_tgi(answer: Answer, stamp_ns: int, event: Any) -> None:
    """A message of text-generation-inference, or a whole answer, which may be the only item of a list."""
    if isinstance(event, list):
        event = event[0]
    if error := event.get("error"):
        raise _ServerError(message(error))
    if token := event.get("token"):
        text = "" if token.get("special") or token.get("special_token") else token.get("text")
    else:
        text = event.get("generated_text")
    if text:
        answer.say(stamp_ns, text)
    if details := event.get("details"):
        finish = details.get("finish_reason")
        if finish == "error":
            raise _ServerError("the server gives no reason")
        answer.prompt_tokens = _whole(details.get("input_length"))
        answer.completion_tokens = _whole(details.get("generated_tokens"))
        answer.end(finish)


def take_sagemaker(answer: Answer, stamp_ns: int, event: Any) -> None:
    """What an LMI container sends: as text-generation-inference, as OpenAI, or `outputs` of its dynamic batches."""
    if isinstance(event, dict) and "choices" in event:
        (take_completion if "text" in (event["choices"] or [_NOTHING])[0] else take_chat)(answer, stamp_ns, event)
    elif isinstance(event, dict) and (texts := event.get("outputs")):
        answer.say(stamp_ns, texts[0])
    else:
        take_tgi(answer, stamp_ns, event)


_NOTHING: Mapping[str, Any] = {}


def _count(answer: Answer, usage: Mapping[str, Any], prompt: str, completion: str) -> None:
    answer.prompt_tokens = _whole(usage.get(prompt))
    answer.completion_tokens = _whole(usage.get(completion))
    answer.cached_tokens = _whole((usage.get(f"{prompt}_details") or _NOTHING).get("cached_tokens"))


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def message(error: Any) -> str:
    """What an error object of a server says."""
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or error).split())[:_MAX_DETAIL]


def shown(data: bytes) -> str:
    """The beginning of bytes that could not be read."""
    return repr(data[:80])[2:-1] + ("..." if len(data) > 80 else "")
