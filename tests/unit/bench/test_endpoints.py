from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.bench.answers import Answer
from llmopt.bench.client.wire import Response
from llmopt.bench.endpoints import ENDPOINTS

TURNS = [("system", "Be brief. "), ("user", "Hello? "), ("assistant", "Yes. "), ("user", "Good.")]


def response(data: bytes, kind: str = "text/event-stream", pieces: int = 1) -> Response:
    """The data in so many receives, at 10, 20, ..."""
    found = Response()
    found.feed(1, f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n".encode())
    size = -(-len(data) // pieces)
    for number in range(pieces):
        found.feed(10 * (number + 1), data[number * size : (number + 1) * size])
    assert found.complete
    return found


def stream(*fields: Any, end: bytes = b"") -> Response:
    return response(b"".join(b"data: %b\n\n" % json.dumps(field).encode() for field in fields) + end)


def lines(*fields: Any) -> Response:
    return response("".join(json.dumps(field) + "\n" for field in fields).encode(), "application/jsonlines")


def whole(fields: Any) -> Response:
    return response(json.dumps(fields).encode(), "application/json")


def named(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


DONE = b"data: [DONE]\n\n"
OPENAI_USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
RESPONSE_USAGE = {"input_tokens": 7, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
DETAILS = {"finish_reason": "length", "generated_tokens": 3, "input_length": 7}
TOKENS = [{"token": {"text": "a"}}, {"token": {"text": "b"}}, {"token": {"text": "</s>", "special": True}}]
SPOKEN = named("response.output_text.delta", delta="a")
LAST = {**TOKENS[-1], "generated_text": "ab", "details": DETAILS}

#: What each endpoint sends for the text "ab" of 3 tokens after a prompt of 7, in every form that it has.
ANSWERS = {
    "completions": [
        stream({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]},
               {"choices": [{"text": "", "finish_reason": "length"}], "usage": OPENAI_USAGE}, end=DONE),
        whole({"choices": [{"text": "ab", "finish_reason": "length"}], "usage": OPENAI_USAGE}),
    ],
    "chat": [
        stream({"choices": [{"delta": {"role": "assistant", "content": ""}}]},
               {"choices": [{"delta": {"content": "a"}}]},
               {"choices": [{"delta": {"content": "b"}, "finish_reason": "length"}]},
               {"choices": [], "usage": OPENAI_USAGE}, end=DONE),
        whole({"choices": [{"message": {"content": "ab"}, "finish_reason": "length"}], "usage": OPENAI_USAGE}),
    ],
    "responses": [
        response(b"".join(
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode()) for event in (
                named("response.created", response={"status": "in_progress", "usage": None}),
                named("response.output_item.added", item={"type": "message"}),
                named("response.output_text.delta", delta="a"),
                named("response.output_text.delta", delta="b"),
                named("response.output_text.done", text="ab"),
                named("response.incomplete", response={
                    "incomplete_details": {"reason": "max_output_tokens"}, "usage": RESPONSE_USAGE, "error": None}),
            ))),
        whole({"object": "response", "error": None, "incomplete_details": {"reason": "max_output_tokens"},
               "output": [{"type": "message", "content": [{"type": "output_text", "text": "ab"}]}],
               "usage": RESPONSE_USAGE}),
    ],
    "triton": [
        stream({"text_output": "a", "num_output_tokens": 1, "num_input_tokens": 7},
               {"text_output": "b", "num_output_tokens": 1}, {"text_output": "", "num_output_tokens": 1}),
        whole({"text_output": ["ab"], "num_output_tokens": 3, "num_input_tokens": 7}),
    ],
    "sagemaker": [
        lines(*TOKENS[:-1], LAST),
        stream(*TOKENS[:-1], LAST),
        whole({"generated_text": "ab", "details": DETAILS}),
        whole([{"generated_text": "ab", "details": DETAILS}]),
        stream({"choices": [{"delta": {"content": "ab"}}]}, {"choices": [], "usage": OPENAI_USAGE}, end=DONE),
        stream({"choices": [{"text": "ab"}]}, {"choices": [], "usage": OPENAI_USAGE}, end=DONE),
    ],
    "tgi": [stream(*TOKENS[:-1], LAST), whole({"generated_text": "ab", "details": DETAILS})],
}  # fmt: skip
CASES = [(name, answer) for name, forms in ANSWERS.items() for answer in forms]


def read(name: str, *fields: Any, end: bytes = b"") -> Answer:
    return ENDPOINTS[name].read(stream(*fields, end=end))


@pytest.mark.parametrize(("name", "answer"), CASES)
def test_every_form_of_an_answer_has_its_text_and_its_tokens(name: str, answer: Response) -> None:
    found = ENDPOINTS[name].read(answer)
    assert (found.failure, found.prompt_tokens, found.completion_tokens) == (None, 7, 3)
    assert ENDPOINTS[name].answer(answer) == "ab"
    assert 1 <= len(found.stamps_ns) <= 2


@pytest.mark.parametrize(("name", "answer"), CASES)
def test_how_the_bytes_came_changes_the_stamps_only(name: str, answer: Response) -> None:
    kind = answer.headers["content-type"]
    for pieces in (2, 7, 50):
        found = ENDPOINTS[name].read(response(answer.body(), kind, pieces))
        assert (found.failure, "".join(found.texts), found.completion_tokens) == (None, "ab", 3)
        assert list(found.stamps_ns) == sorted(found.stamps_ns)


@pytest.mark.parametrize("pieces", [1, 3, 20, 1000])
def test_a_token_has_the_stamp_of_the_receive_that_completed_it(pieces: int) -> None:
    for answer in (ANSWERS["sagemaker"][0], ANSWERS["completions"][0]):
        whole_body = answer.body()
        size = -(-len(whole_body) // pieces)
        found = ENDPOINTS["sagemaker"].read(response(whole_body, answer.headers["content-type"], pieces))
        ends = [whole_body.index(text) + len(text) for text in (b'"a"}', b'"b"}')]
        for stamp_ns, end in zip(found.stamps_ns, ends, strict=True):
            assert stamp_ns // 10 - 1 >= end // size - 1
            assert stamp_ns // 10 - 1 <= (end + 12) // size + 1


@pytest.mark.parametrize("name", ENDPOINTS)
def test_every_endpoint_asks_for_a_greedy_stream_of_the_length(name: str) -> None:
    sent = json.loads(ENDPOINTS[name].body(model="m", turns=TURNS, output_tokens=9))
    flat = {**sent, **sent.get("parameters", {})}
    assert [value for key, value in flat.items() if "max" in key] == [9]
    assert flat.get("temperature", 0) == 0
    assert not flat.get("do_sample")
    assert flat.get("stream") or ENDPOINTS[name].route.endswith("_stream")


@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_templated_endpoint_gets_turns_and_another_their_text(name: str) -> None:
    sent = json.loads(ENDPOINTS[name].body(model="m", turns=TURNS, output_tokens=9))
    if ENDPOINTS[name].templated:
        turns = sent.get("messages") or sent.get("input")
        assert [(turn["role"], turn["content"]) for turn in turns] == TURNS
    else:
        assert "Be brief. Hello? Yes. Good." in sent.values()


def test_the_model_is_in_the_body_or_in_the_path() -> None:
    for endpoint in ENDPOINTS.values():
        body = json.loads(endpoint.body(model="org/m", turns=TURNS, output_tokens=1))
        assert body.get("model") == ("org/m" if endpoint.name in ("completions", "chat", "responses") else None)
    assert ENDPOINTS["triton"].path_for("org/m") == "/v2/models/org%2Fm/generate_stream"
    assert ENDPOINTS["chat"].path_for("org/m") == "/v1/chat/completions"


def test_reasoning_is_output_but_no_part_of_the_answer() -> None:
    chat = read("chat", *({"choices": [{"delta": {key: text}}]} for key, text in (
        ("reasoning_content", "hm"), ("reasoning", "well"), ("content", "yes"))), end=DONE)  # fmt: skip
    responses = read(
        "responses",
        named("response.reasoning_text.delta", delta="hm"),
        named("response.reasoning_summary_text.delta", delta="well"),
        named("response.output_text.delta", delta="yes"),
        named("response.completed", response={}),
    )
    for found in (chat, responses):
        assert (found.failure, len(found.stamps_ns), found.texts) == (None, 3, ["yes"])
        assert found.answer_ns == found.stamps_ns[2]


def test_tool_calls_are_output() -> None:
    call = {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{"}}]}}]}
    assert len(read("chat", call, call, end=DONE).stamps_ns) == 2
    arguments = named("response.function_call_arguments.delta", delta="{")
    assert len(read("responses", arguments, named("response.completed", response={})).stamps_ns) == 1


ERRORS = {
    "completions": {"error": {"message": "out of memory"}},
    "chat": {"error": {"message": "out of memory"}},
    "responses": named("response.failed", response={"error": {"code": "server_error", "message": "out of memory"}}),
    "triton": {"error": "out of memory"},
    "sagemaker": {"error": "out of memory", "code": 424},
    "tgi": {"error": "out of memory", "error_type": "overloaded"},
}


@pytest.mark.parametrize("name", ENDPOINTS)
def test_an_error_inside_an_answer_is_the_server_s(name: str) -> None:
    for found in (read(name, ERRORS[name]), ENDPOINTS[name].read(whole(ERRORS[name]))):
        assert found.failure is not None
        assert found.failure.kind == "server_error"
        assert "out of memory" in found.failure.detail


def test_a_finish_reason_of_error_is_the_server_s() -> None:
    last = {
        "token": {"text": "", "special_token": True},
        "details": {"finish_reason": "error", "generated_tokens": None},
    }
    found = ENDPOINTS["sagemaker"].read(lines(TOKENS[0], last))
    assert found.failure is not None
    assert found.failure.kind == "server_error"
    assert len(found.stamps_ns) == 1


@pytest.mark.parametrize(("name", "first"), [("tgi", TOKENS[0]), ("responses", SPOKEN)])
def test_a_stream_that_stops_without_a_word_is_cut(name: str, first: Any) -> None:
    found = read(name, first)
    assert found.failure is not None
    assert found.failure.kind == "cut"


def test_a_dynamic_batch_of_lmi_has_outputs() -> None:
    assert ENDPOINTS["sagemaker"].answer(lines({"outputs": ["This"]}, {"outputs": [" is"]})) == "This is"


KEYS = ["choices", "text", "usage", "error", "delta", "message", "content", "type", "response", "output", "token"]
KEYS += ["details", "generated_text", "text_output", "outputs", "finish_reason", "incomplete_details", "item"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@given(fields=JSON)
def test_any_json_is_an_answer_or_a_failure(fields: Any) -> None:
    for endpoint in ENDPOINTS.values():
        for answer in (stream(fields), whole(fields), lines(fields)):
            found = endpoint.read(answer)
            assert found.failure is not None or len(found.stamps_ns)
            assert isinstance(endpoint.answer(answer), str)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_a_failure(data: bytes) -> None:
    for endpoint in ENDPOINTS.values():
        for kind in ("text/event-stream", "application/json", "application/jsonlines", "text/html"):
            assert endpoint.read(response(data, kind)).failure is not None
