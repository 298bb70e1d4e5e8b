"""Request bodies: what is accepted, and that everything else is refused by name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.serve.protocol import MAX_PROMPTS, UNSUPPORTED, ApiError, Call, parse


def completion(**fields: Any) -> Call:
    return parse(json.dumps({"prompt": "a"} | fields).encode(), chat=False, model_name="tiny")


def chat(**fields: Any) -> Call:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    return parse(json.dumps(body).encode(), chat=True, model_name="tiny")


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        completion(**fields)
    return error.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_these(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [None, 7, {}, [], [[]], [1, "a"], [True], [1.5], ["a"] * (MAX_PROMPTS + 1), "\ud800"]
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    error = refusal(prompt=prompt)
    assert (error.status, error.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "8"), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("min_tokens", -1),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -2), ("top_k", 1.0), ("seed", "x"), ("stop", 3), ("stop", [""]), ("stop", ["a", 1]), ("model", 3),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("stream_options", 1), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert (error.status, error.param) == (400, field)
    assert f"`{field}`" in str(error)


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    assert refusal(max_tokens=3, min_tokens=4).param == "min_tokens"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_parameter_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    error = refusal(**{name: ["something"]})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    for harmless in (None, *UNSUPPORTED[name]):
        completion(**{name: harmless})


def test_zero_logprobs_are_not_no_logprobs() -> None:
    assert refusal(logprobs=0).param == "logprobs"


def test_an_unknown_parameter_is_ignored() -> None:
    assert completion(user="me", metadata={"a": 1}) is not None


def test_null_is_absent() -> None:
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "stop", "stream", "stream_options", "ignore_eos")
    call = completion(seed=1, **dict.fromkeys(names))
    assert call == completion(seed=1)
    assert (call.sampling.max_tokens, call.sampling.temperature, call.stop, call.stream) == (None, 1.0, (), False)


def test_an_unknown_model_is_not_found() -> None:
    error = refusal(model="huge")
    assert (error.status, error.code) == (404, "model_not_found")
    assert "`tiny`" in str(error)


def test_the_newer_name_of_the_limit_goes_first() -> None:
    assert completion(max_tokens=3, max_completion_tokens=5).sampling.max_tokens == 5


def test_without_a_seed_every_request_has_its_own() -> None:
    assert completion().sampling.seed != completion().sampling.seed
    assert completion(seed=7).sampling.seed == 7
    assert completion(seed=-1).sampling.seed >= 0


def test_no_limit_on_top_k_can_be_said_as_minus_one() -> None:
    assert completion(top_k=-1).sampling.top_k == completion(top_k=0).sampling.top_k == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"temperature": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse(body, chat=False, model_name="tiny")
    assert (error.value.status, error.value.code) == (400, "invalid_json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
    max_leaves=8,
)
FIELDS = ["prompt", "messages", "stop", "seed", "top_p", "top_k", "temperature", "max_tokens", "stream", "model", "n"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.booleans())
def test_whatever_the_body_it_is_a_call_or_a_refusal(fields: dict[str, Any], chat: bool) -> None:
    body = json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "a"}]} | fields).encode()
    with contextlib.suppress(ApiError):
        parse(body, chat=chat, model_name="tiny")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == ({"role": "user", "content": "ab"},)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (None, "messages"),
        ([1], "messages.0"),
        ([{"content": "hi"}], "messages.0"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 1}], "messages.0.content"),
        ([{"role": "user", "content": "\ud800"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "messages.1"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: Any, param: str) -> None:
    with pytest.raises(ApiError) as error:
        chat(messages=messages)
    assert (error.value.status, error.value.param) == (400, param)


def test_an_error_has_openais_shape() -> None:
    body = ApiError(400, "no", param="n", code="c").body()
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "c"}}
    assert ApiError(500, "no").body()["error"]["type"] == "server_error"
