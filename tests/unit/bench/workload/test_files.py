from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.workload.files import Texts, Trace, read
from llmopt.errors import LlmoptError

Written = Callable[[str, str], Path]
QUESTION = {"from": "human", "value": "why?"}
ANSWER = {"from": "gpt", "value": "because"}


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def rows(*values: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, values))


def texts(file: Path) -> Texts:
    found = read(file)
    assert isinstance(found, Texts)
    return found


def trace(file: Path) -> Trace:
    found = read(file)
    assert isinstance(found, Trace)
    return found


def test_a_prompt_is_what_the_user_says(written: Written) -> None:
    (dialogue,) = texts(written("a.jsonl", rows({"prompt": "hello", "output_tokens": 7}))).dialogues
    assert dialogue.rows[0].said == (("user", "hello"),)
    assert dialogue.rows[0].output_tokens == 7


def test_messages_keep_their_roles_and_order(written: Written) -> None:
    said = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in said]
    (dialogue,) = texts(written("a.jsonl", rows({"messages": messages}))).dialogues
    assert dialogue.rows[0].said == tuple(said)


def test_rows_of_a_session_are_turns_of_one_conversation(written: Written) -> None:
    file = written(
        "a.jsonl",
        rows({"prompt": "1", "session": "x"}, {"prompt": "other"}, {"prompt": "2", "session": "x", "think_s": 3}),
    )
    first, second = texts(file).dialogues
    assert [row.said[0][1] for row in first.rows] == ["1", "2"]
    assert first.rows[1].think_s == 3
    assert len(second.rows) == 1


def test_rows_with_times_come_in_their_order(written: Written) -> None:
    found = texts(written("a.jsonl", rows({"prompt": "late", "at_s": 9}, {"prompt": "soon", "at_s": 1.5})))
    assert found.timed
    assert [dialogue.at_s for dialogue in found.dialogues] == [1.5, 9]


def test_empty_lines_are_no_rows(written: Written) -> None:
    assert len(texts(written("a.jsonl", '\n{"prompt": "a"}\n\n')).dialogues) == 1


def test_sharegpt_is_questions_with_recorded_answers(written: Written) -> None:
    (dialogue,) = texts(written("a.json", json.dumps([{"conversations": [QUESTION, ANSWER] * 2}]))).dialogues
    assert [row.recorded for row in dialogue.rows] == ["because", "because"]


def test_sharegpt_that_the_model_begins_is_left_out_and_counted(written: Written) -> None:
    values = [{"conversations": turns} for turns in ([ANSWER, QUESTION], [QUESTION], [], [QUESTION, ANSWER])]
    found = texts(written("a.json", json.dumps(values)))
    assert (len(found.dialogues), found.left_out) == (1, 3)


def test_sharegpt_ends_before_a_question_without_an_answer(written: Written) -> None:
    (dialogue,) = texts(written("a.json", json.dumps([{"conversations": [QUESTION, ANSWER, QUESTION]}]))).dialogues
    assert len(dialogue.rows) == 1


def test_a_mooncake_trace_has_times_lengths_and_blocks(written: Written) -> None:
    line = {"timestamp": 2500, "input_length": 600, "output_length": 9, "hash_ids": [4, 7]}
    later = {"timestamp": 1000, "input_length": 10, "output_length": 1, "hash_ids": [8]}
    first, second = trace(written("a.jsonl", rows(line, later))).in_order()
    assert first == (0.0, 10, 1, (8,))
    assert second == (1.5, 600, 9, (4, 7))


def test_burstgpt_leaves_out_requests_that_failed(written: Written) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    )
    found = trace(written("a.csv", text))
    assert [request[:3] for request in found.in_order()] == [(0.0, 472, 18), (113.0, 417, 276)]
    assert found.left_out == 1


def test_azure_dates_become_seconds(written: Written) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:06,1,8\n"
    )
    first, second, third = trace(written("a.csv", text)).in_order()
    assert (first.at_s, second.at_s) == (0.0, pytest.approx(0.052, abs=1e-5))
    assert third.at_s == pytest.approx(2.02, abs=0.001)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n[1]', "a.jsonl:2: a row is a JSON object"),
        ("a.jsonl", '{"promt": "a"}', "a.jsonl:1: a row has no `promt`"),
        ("a.jsonl", '{"prompt": "a", "messages": []}', "a.jsonl:1: a row needs either"),
        ("a.jsonl", '{"output_tokens": 3}', "a.jsonl:1: a row needs either"),
        ("a.jsonl", '{"prompt": ""}', "a.jsonl:1: a prompt must be text"),
        ("a.jsonl", '{"prompt": 5}', "a.jsonl:1: a prompt must be text"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "a.jsonl:1: a prompt must be text"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "x"}]}', "a.jsonl:1: `messages` must be"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "a.jsonl:1: `messages` must be"),
        ("a.jsonl", '{"prompt": "a", "output_tokens": 0}', "a.jsonl:1: `output_tokens` must be"),
        ("a.jsonl", '{"prompt": "a", "at_s": -1}', "a.jsonl:1: `at_s` must be"),
        ("a.jsonl", '{"prompt": "a", "at_s": 1}\n{"prompt": "b"}', "a.jsonl:2: some rows have an `at_s`"),
        ("a.jsonl", '{"prompt": "a", "session": 1}\n{"prompt": "b", "session": 1, "at_s": 2}', "a.jsonl:2: only the"),
        ("a.jsonl", '{"input_length": 5, "output_length": 5}', "a.jsonl:1: `timestamp` must be"),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}',
            "a.jsonl:1: 1 `hash_ids` are not those of 600 tokens",
        ),
        ("a.jsonl", "\n", "a.jsonl has no request in it"),
        ("a.json", "{}", "a.json: not a list of conversations"),
        ("a.json", "[[]]", "a.json: item 0 has no `conversations`"),
        ("a.json", "[", "a.json: not JSON"),
        ("a.json", "[]", "a.json has no request in it"),
        ("a.csv", "a,b\n1,2\n", "a.csv:1: these are not the columns"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\n1,2,x\n", "a.csv:2: not a time and two numbers"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\n1,2\n", "a.csv:2: not a time and two numbers"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\n1,2,-2\n", "a.csv:2: a time or a number"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\nnan,2,2\n", "a.csv:2: a time or a number"),
        ("a.csv", f"Timestamp,Request tokens,Response tokens\n1,2,{10**30}\n", "a.csv:2: a time or a number"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\n1,2," + "2" * 200_000, "a.csv is not CSV"),
    ],
)
def test_what_does_not_fit_is_an_error_with_file_line_and_hint(
    written: Written, name: str, text: str, message: str
) -> None:
    with pytest.raises(LlmoptError, match=message) as caught:
        read(written(name, text))
    assert caught.value.hint


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(LlmoptError, match=r"a.jsonl is not UTF-8"):
        read(tmp_path / "a.jsonl")
