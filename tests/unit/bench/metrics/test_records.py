from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.client.base import Exchange, Failure, Job
from llmopt.bench.client.wire import Response
from llmopt.bench.endpoints import ENDPOINTS
from llmopt.bench.metrics.records import CLASSES, Record, read


def answer(data: bytes, *, status: int = 200, kind: str = "text/event-stream") -> Exchange:
    response = Response()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
    response.feed(5, head.encode() + data)
    return Exchange(Job(b"", 3), None, sent_ns=0, end_ns=9, response=response, failure=None)


def stream(*fields: Any, done: bool = True) -> Exchange:
    lines = [f"data: {json.dumps(field)}\n\n" for field in fields] + ["data: [DONE]\n\n"] * done
    return answer("".join(lines).encode())


def completion(exchange: Exchange) -> Record:
    return read(exchange, "completions")


def failure_of(exchange: Exchange) -> Failure:
    found = completion(exchange).failure
    assert found is not None
    return found


TEXT = {"choices": [{"text": "a"}]}


def test_a_chunk_without_text_is_no_token() -> None:
    empty = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert len(completion(stream(TEXT, empty, TEXT)).stamps_ns) == 2


def test_reasoning_counts_as_the_first_token_of_a_chat() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}, {"content": None}]
    found = read(stream(*({"choices": [{"delta": delta}]} for delta in deltas)), "chat")
    assert found.failure is None
    assert len(found.stamps_ns) == 2


def test_tokens_are_the_server_s_usage_or_else_chunks() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    assert completion(stream(TEXT, TEXT, usage)).tokens == 5
    assert completion(stream(TEXT, TEXT, usage)).prompt_tokens == 7
    assert completion(stream(TEXT, TEXT)).tokens == 2


def test_usage_repeated_in_every_chunk_is_the_last_one() -> None:
    counted = [{**TEXT, "usage": {"completion_tokens": n}} for n in (1, 2, 3)]
    assert completion(stream(*counted)).tokens == 3


def test_a_whole_answer_is_one_token_stamp_and_not_streamed() -> None:
    text = json.dumps({"choices": [{"text": "abc"}], "usage": {"completion_tokens": 3}}).encode()
    found = completion(answer(text, kind="application/json"))
    assert (found.streamed, found.tokens, list(found.stamps_ns), found.failure) == (False, 3, [5], None)


@pytest.mark.parametrize("end", [{"choices": [{"finish_reason": "length"}]}, {"usage": {"total_tokens": 2}}])
def test_a_stream_may_end_without_done_if_it_says_that_it_has_ended(end: dict[str, Any]) -> None:
    assert completion(stream(TEXT, end, done=False)).failure is None


def test_a_stream_that_just_stops_is_cut() -> None:
    assert failure_of(stream(TEXT, done=False)).kind == "cut"


def test_a_stream_without_text_is_empty() -> None:
    assert failure_of(stream()).kind == "empty"


def test_an_error_in_the_stream_is_the_server_s() -> None:
    found = failure_of(stream(TEXT, {"error": {"message": "out of memory"}}))
    assert found == Failure("server_error", "an error in the stream: out of memory")


@pytest.mark.parametrize("data", [b"{not json", b'"\xff"', b"[1]", b'{"choices": 5}', b'{"choices": ["x"]}', b"7"])
def test_what_is_not_an_openai_style_event_is_malformed(data: bytes) -> None:
    found = completion(answer(b'data: {"choices": [{"text": "a"}]}\n\ndata: ' + data + b"\n\ndata: [DONE]\n\n"))
    assert found.failure is not None
    assert found.failure.kind == "malformed"
    assert len(found.stamps_ns) == 1


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (404, '{"error": {"message": "no such model"}}', Failure("http_4xx", "HTTP 404: no such model")),
        (422, '{"detail": "bad field"}', Failure("http_4xx", "HTTP 422: bad field")),
        (503, "busy", Failure("http_5xx", "HTTP 503: busy")),
        (302, "", Failure("http_3xx", "HTTP 302: ")),
    ],
)
def test_an_http_error_is_classed_and_says_the_server_s_message(status: int, text: str, expected: Failure) -> None:
    assert failure_of(answer(text.encode(), status=status)) == expected


def test_a_failure_on_the_wire_keeps_the_tokens_before_it() -> None:
    response = Response()
    response.feed(5, b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n")
    response.feed(6, b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choi')
    late = Failure("timeout", "no end within 1 s")
    found = completion(Exchange(Job(b"", 0), None, 0, 9, response, late))
    assert list(found.stamps_ns) == [6]
    assert found.failure == late


@given(data=st.binary(max_size=200), kind=st.sampled_from(["text/event-stream", "application/json"]))
def test_any_answer_makes_a_record(data: bytes, kind: str) -> None:
    assert completion(answer(data, kind=kind)).failure is not None


KEYS = st.sampled_from(["choices", "text", "usage", "error", "delta"])


@given(
    fields=st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_json_event_makes_a_record(fields: Any) -> None:
    for endpoint in ENDPOINTS:
        read(stream(fields), endpoint)


def test_a_server_that_limits_the_rate_says_how_long_to_wait() -> None:
    response = Response()
    response.feed(5, b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 4\r\n\r\nslow")
    found = read(Exchange(Job(b"", 0), None, 0, 9, response, None), "chat")
    assert found.failure == Failure("http_429", "HTTP 429: slow (Retry-After: 7)")


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "http_401"), (403, "http_403"), (418, "http_4xx"), (502, "http_5xx")]
)
def test_a_status_has_its_class(status: int, kind: str) -> None:
    assert failure_of(answer(b"{}", status=status)).kind == kind
    assert kind in CLASSES


def test_a_request_without_an_answer_keeps_what_is_known_of_it() -> None:
    job = Job(b"", 3, turn=2, target=1, wanted_tokens=64)
    found = read(Exchange(job, 5, 6, 7, None, Failure("refused", "no")), "chat")
    assert (found.prompt, found.turn, found.target, found.due_ns, found.wanted_tokens) == (3, 2, 1, 5, 64)
    assert (found.status, found.tokens, found.failure) == (0, 0, Failure("refused", "no"))


def test_a_record_can_be_read_in_another_process() -> None:
    found = completion(stream(TEXT, TEXT))
    assert pickle.loads(pickle.dumps(found)) == found
    assert pickle.loads(pickle.dumps(partial(read, endpoint="chat")))(stream({"choices": []})).failure is not None


def test_stamps_take_little_memory() -> None:
    found = completion(stream(*[TEXT] * 1000))
    assert sys.getsizeof(found.stamps_ns) < 10 * 1000
