"""The server over a real engine, spoken to over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

CONTEXT = 8192
CHAT = [{"role": "user", "content": "hello"}]


def texts(chunks: list[Any]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_the_model_is_listed_with_its_context(server: Any) -> None:
    status, reply = server.request("GET", "/v1/models")
    assert status == 200
    assert [(card["id"], card["max_model_len"]) for card in reply["data"]] == [("tiny", CONTEXT)]
    assert server.request("GET", "/v1/models/tiny")[1]["id"] == "tiny"
    assert server.request("GET", "/v1/models/other")[0] == 404


def test_it_is_healthy(server: Any) -> None:
    assert server.request("GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_exactly_the_tokens_asked_for_come(server: Any, length: int) -> None:
    reply = server.complete(max_tokens=length, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == length
    assert reply["choices"][0]["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_prompts_tokens_are_counted(server: Any, engine: Path) -> None:
    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
    text = "the other server, très bien 東京"
    assert server.complete(text, max_tokens=1)["usage"]["prompt_tokens"] == len(tokenizer.encode(text).ids)


def test_a_stream_says_what_a_whole_reply_says(server: Any) -> None:
    whole = server.complete(max_tokens=300, ignore_eos=True)
    stream = server.stream(prompt="the server", max_tokens=300, ignore_eos=True, stream_options={"include_usage": True})
    *chunks, last = stream
    stream.close()
    assert stream.done
    assert stream.reply.headers["content-type"].startswith("text/event-stream")
    assert texts(chunks) == whole["choices"][0]["text"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len(chunks) > 200  # one for each token, except where a character is not complete yet


def test_a_stream_without_the_option_has_no_usage(server: Any) -> None:
    stream = server.stream(prompt="the", max_tokens=3)
    assert all("usage" not in chunk for chunk in stream)
    stream.close()


def test_the_text_is_the_decoding_of_the_models_greedy_tokens(server: Any, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = tokenizer.encode("the server").ids
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    expected = tokenizer.decode(tokens[0, len(prompt) :].tolist())
    assert server.complete(prompt, max_tokens=32, ignore_eos=True)["choices"][0]["text"] == expected


def test_text_and_its_token_ids_are_the_same_prompt(server: Any, engine: Path) -> None:
    ids = Tokenizer.from_file(str(engine / "tokenizer.json")).encode("the server").ids
    by_text, by_ids = (server.complete(p, max_tokens=20)["choices"] for p in ("the server", ids))
    assert by_text == by_ids


def test_several_prompts_are_answered_by_index(server: Any) -> None:
    prompts = ["the server", "another", "then"]
    alone = [server.complete(p, max_tokens=12)["choices"][0]["text"] for p in prompts]
    reply = server.complete(prompts, max_tokens=12, ignore_eos=True)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == list(enumerate(alone))
    assert reply["usage"]["completion_tokens"] == 36
    stream = server.stream(prompt=prompts, max_tokens=12, ignore_eos=True)
    parts = dict.fromkeys(range(3), "")
    for chunk in stream:
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["text"]
    stream.close()
    assert list(parts.values()) == alone


def test_a_chat_is_the_rendered_template(server: Any) -> None:
    status, reply = server.request(
        "POST", "/v1/chat/completions", {"messages": CHAT, "temperature": 0, "max_tokens": 20}
    )
    assert status == 200
    assert (reply["object"], reply["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    plain = server.complete("<|user|>hello<|end|><|assistant|>", max_tokens=20)
    assert reply["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert reply["usage"] == plain["usage"]


def test_a_streamed_chat_says_the_role_once(server: Any) -> None:
    fields = {"messages": CHAT, "max_tokens": 40, "ignore_eos": True}
    stream = server.stream("/v1/chat/completions", **fields)
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]
    stream.close()
    whole = server.request("POST", "/v1/chat/completions", {"temperature": 0} | fields)[1]
    assert [i for i, delta in enumerate(deltas) if "role" in delta] == [0]
    assert "".join(delta["content"] for delta in deltas) == whole["choices"][0]["message"]["content"]


def test_the_end_of_sequence_ends_a_completion_and_has_no_text(server: Any) -> None:
    for seed in range(40):
        free = server.complete(max_tokens=400, temperature=1.5, seed=seed)
        if free["choices"][0]["finish_reason"] == "stop":
            break
    assert free["choices"][0]["finish_reason"] == "stop"
    count = free["usage"]["completion_tokens"]
    assert count < 400
    assert "<|end|>" not in free["choices"][0]["text"]
    forced = server.complete(max_tokens=400, temperature=1.5, seed=seed, ignore_eos=True)
    assert forced["usage"]["completion_tokens"] == 400
    assert forced["choices"][0]["text"].startswith(free["choices"][0]["text"].rstrip("\ufffd"))
    longer = server.complete(max_tokens=400, temperature=1.5, seed=seed, min_tokens=count + 5)
    assert longer["usage"]["completion_tokens"] >= count + 5


def stop_in(text: str) -> str:
    """Three characters of the middle of `text` that occur nowhere before."""
    return next(
        text[i : i + 3]
        for i in range(len(text) // 2, len(text) - 3)
        if text.find(text[i : i + 3]) == i and "\ufffd" not in text[i : i + 3]
    )


def test_a_stop_string_cuts_the_text_and_the_count(server: Any) -> None:
    whole = server.complete(max_tokens=200, ignore_eos=True)["choices"][0]["text"]
    stop = stop_in(whole)
    for stops in (stop, ["not there", stop]):
        reply = server.complete(max_tokens=200, ignore_eos=True, stop=stops)
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["choices"][0]["text"] == whole[: whole.find(stop)]
    count = reply["usage"]["completion_tokens"]
    assert count < 200
    shorter = server.complete(max_tokens=count - 1, ignore_eos=True)["choices"][0]["text"]
    assert stop not in shorter
    assert stop in server.complete(max_tokens=count, ignore_eos=True)["choices"][0]["text"]
    stream = server.stream(prompt="the server", max_tokens=200, ignore_eos=True, stop=stop)
    chunks = list(stream)
    stream.close()
    assert texts(chunks) == whole[: whole.find(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_seed_repeats_a_sample_and_another_gives_another(server: Any) -> None:
    def sample(seed: int, **fields: Any) -> str:
        reply = server.complete(max_tokens=30, temperature=1.0, ignore_eos=True, seed=seed, **fields)
        return str(reply["choices"][0]["text"])

    assert sample(1) == sample(1) != sample(2)


def test_one_candidate_is_the_greedy_choice(server: Any) -> None:
    greedy = server.complete(max_tokens=20)["choices"][0]["text"]
    for fields in ({"top_k": 1}, {"top_p": 1e-300}, {"temperature": 1e-4}, {"temperature": 1e-300}):
        assert server.complete(max_tokens=20, **({"temperature": 1.0} | fields))["choices"][0]["text"] == greedy


def test_more_candidates_than_tokens_are_all_of_them(server: Any) -> None:
    fields = {"max_tokens": 20, "temperature": 1.0, "seed": 3}
    assert server.complete(top_k=10**12, **fields)["choices"] == server.complete(**fields)["choices"]


def test_without_a_limit_the_context_is_filled(server: Any) -> None:
    prompt = [5] * (CONTEXT - 40)
    reply = server.complete(prompt, ignore_eos=True)
    assert reply["usage"] == {
        "prompt_tokens": CONTEXT - 40, "completion_tokens": 40, "total_tokens": CONTEXT
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5] * (CONTEXT - 10), "max_tokens": 11}, "prompt"),
        ({"prompt": [5] * CONTEXT}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(server: Any, fields: dict[str, Any], param: str) -> None:
    status, reply = server.request("POST", "/v1/completions", fields)
    assert status == 400
    error = reply["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "context_length_exceeded")
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{not json", 400),
        ("/v1/completions", {"prompt": 7}, 400),
        ("/v1/completions", {"prompt": ""}, 400),
        ("/v1/completions", {"prompt": [1, 320]}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400),
        ("/v1/completions", {"prompt": "a", "stream": True, "logprobs": 1}, 400),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("/v1/completions", {"prompt": "a", "model": "\ud800"}, 404),
        ("/v1/completions", {"prompt": "a", "min_tokens": CONTEXT}, 400),
        ("/v1/completions", b"x" * ((8 << 20) + 1), 413),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": "x"}]}, 400),
        ("/v1/nothing", {}, 404),
        ("/health", {}, 405),
    ],
)
def test_a_bad_request_is_told_in_openais_shape_and_the_next_one_works(
    server: Any, path: str, body: Any, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body) if isinstance(body, dict) else body)
        reply = connection.getresponse()
        error = json.loads(reply.read())["error"]
        assert reply.status == status
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 1}))
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200
    finally:
        connection.close()


def test_the_templates_own_words_reach_the_client(server: Any) -> None:
    body = {"messages": [{"role": "nobody", "content": "x"}]}
    assert "nobody speaks" in server.request("POST", "/v1/chat/completions", body)[1]["error"]["message"]


def test_a_long_request_blocks_neither_short_ones_nor_health(server: Any) -> None:
    stream = server.stream(prompt="the server", max_tokens=4000, ignore_eos=True)
    chunks = iter(stream)
    next(chunks)
    ended: list[float] = []

    def read_on() -> None:
        for _ in chunks:
            pass
        ended.append(time.monotonic())

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        server.complete(max_tokens=4)
        server.request("GET", "/health")
        assert not ended
    finally:
        reader.join()
        stream.close()
    assert stream.done


def test_requests_side_by_side_get_the_tokens_they_get_alone(
    server: Any, in_background: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    prompts = [[3 + i] * (5 + 40 * i) for i in range(8)]
    alone = [server.complete(p, max_tokens=64, ignore_eos=True)["choices"][0]["text"] for p in prompts]
    together: dict[int, str] = {}

    def ask(i: int) -> None:
        together[i] = server.complete(prompts[i], max_tokens=64, ignore_eos=True)["choices"][0]["text"]

    threads = [in_background(lambda i=i: ask(i)) for i in range(8)]
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone
