from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.bench.workload.prompts import load_tokenizer
from llmopt.bench.workload.source import Conversation, Source, open_source
from llmopt.bench.workload.spec import Workload, resolve
from llmopt.errors import LlmoptError


def ids(tokenizer: Path | None, text: str, *, special: bool = True) -> list[int]:
    assert tokenizer is not None
    found: list[int] = load_tokenizer(tokenizer).encode(text, add_special_tokens=special).ids
    return found


def opened(reference: Any, tokenizer: Path | None = None, seed: int = 0, *, templated: bool = False) -> Source:
    workload = reference if isinstance(reference, Workload) else resolve(reference)
    return open_source(workload, tokenizer, seed, templated=templated)


def first_text(conversation: Conversation) -> str:
    return "".join(text for _, text in conversation.turns[0].said)


def mooncake(folder: Path, *lines: tuple[int, list[int]]) -> str:
    file = folder / "trace.jsonl"
    values = [
        {"timestamp": 100 * i, "input_length": length, "output_length": 3 + i, "hash_ids": blocks}
        for i, (length, blocks) in enumerate(lines)
    ]
    file.write_text("\n".join(map(json.dumps, values)))
    return str(file)


def rows(folder: Path, *values: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, values)))
    return str(file)


def test_the_default_is_single_prompts_of_128_tokens_that_share_no_beginning(any_tokenizer: Path) -> None:
    found = opened(None, any_tokenizer).take(100)
    assert {len(ids(any_tokenizer, first_text(c))) for c in found} == {128}
    assert {c.turns[0].output_tokens for c in found} == {64}
    assert {len(c.turns) for c in found} == {1}
    assert len({first_text(c)[:24] for c in found}) == 100


def test_prompts_of_drawn_lengths_are_exact_with_the_special_tokens(any_tokenizer: Path) -> None:
    found = opened({"prompt_tokens": {"median": 60, "p90": 300}}, any_tokenizer).take(40)
    lengths = [c.turns[0].prompt_tokens for c in found]
    assert lengths == [len(ids(any_tokenizer, first_text(c))) for c in found]
    assert len(set(lengths)) > 20


def test_a_prefix_and_its_prompt_are_exact_together_and_its_tokens_are_shared(any_tokenizer: Path) -> None:
    found = opened({"prefix_tokens": 50, "prompt_tokens": 30}, any_tokenizer).take(20)
    encoded = [ids(any_tokenizer, first_text(c)) for c in found]
    assert {len(tokens) for tokens in encoded} == {80}
    assert {c.turns[0].prompt_tokens for c in found} == {80}
    # One of the special tokens may be at the end: then it is not among those of the prefix.
    assert len({tuple(tokens[:49]) for tokens in encoded}) == 1
    assert len({first_text(c) for c in found}) == 20


def test_a_prefix_is_shared_to_its_last_token(tokenizer_file: Path) -> None:
    found = opened({"prefix_tokens": 50, "prompt_tokens": 30}, tokenizer_file).take(20)
    encoded = [ids(tokenizer_file, first_text(c)) for c in found]
    assert len({tuple(tokens[:50]) for tokens in encoded}) == 1
    assert len({tuple(tokens[:52]) for tokens in encoded}) > 10


def test_for_a_chat_the_prefix_is_the_system_prompt_and_no_special_token_counts(any_tokenizer: Path) -> None:
    found = opened({"prefix_tokens": 50, "prompt_tokens": 30}, any_tokenizer, templated=True).take(5)
    for conversation in found:
        (role, prefix), (user, prompt) = conversation.turns[0].said
        assert (role, user) == ("system", "user")
        assert len(ids(any_tokenizer, prefix, special=False)) == 50
        assert len(ids(any_tokenizer, prompt, special=False)) == 30


def test_there_are_as_many_prefixes_as_asked_for() -> None:
    found = opened({"prefix_tokens": 20, "prefixes": 3}).take(60)
    assert len({c.turns[0].said[0][1] for c in found}) == 3


def test_later_turns_have_their_own_length_and_time_to_think(any_tokenizer: Path) -> None:
    reference = {"turns": 3, "prompt_tokens": 40, "next_tokens": 12, "think_s": {"min": 1, "max": 2}}
    for templated in (True, False):
        for conversation in opened(reference, any_tokenizer, templated=templated).take(5):
            first, *later = conversation.turns
            assert len(later) == 2
            assert first.think_s == 0
            assert first.prompt_tokens == 40
            assert {turn.prompt_tokens for turn in later} == {None}
            assert all(1 <= turn.think_s <= 2 for turn in later)


def test_a_later_turn_adds_its_tokens_to_a_history(tokenizer_file: Path) -> None:
    history = "The answer to that was short."
    for conversation in opened({"turns": 2, "next_tokens": 12}, tokenizer_file).take(10):
        text = history + conversation.turns[1].said[0][1]
        assert len(ids(tokenizer_file, text)) == len(ids(tokenizer_file, history)) + 12


def test_without_a_tokenizer_a_token_is_four_characters() -> None:
    source = opened({"prefix_tokens": 10, "prompt_tokens": 30})
    assert not source.exact
    found = source.take(5)
    assert {len(first_text(c)) for c in found} == {160}
    assert {c.turns[0].prompt_tokens for c in found} == {None}


@settings(max_examples=25)
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(0, 5))
def test_conversations_do_not_depend_on_how_they_are_taken(amounts: list[int], seed: int) -> None:
    reference = {
        "prompt_tokens": {"min": 5, "max": 50},
        "prefix_tokens": 9,
        "prefixes": 3,
        "turns": {"min": 1, "max": 3},
    }
    one, other = opened(reference, seed=seed), opened(reference, seed=seed)
    assert [c for amount in amounts for c in one.take(amount)] == other.take(sum(amounts))


def test_another_seed_gives_other_conversations() -> None:
    one, other = (opened(None, seed=seed).take(20) for seed in (1, 2))
    assert not {first_text(c) for c in one} & {first_text(c) for c in other}


def test_rewound_it_begins_again(tmp_path: Path) -> None:
    for reference in (None, {"prefix_tokens": 9, "prefixes": 2}, mooncake(tmp_path, (5, [1]), (7, [2]))):
        source = opened(reference)
        first = source.take(2)
        source.take(1)
        source.rewind()
        assert source.take(2) == first


def test_the_same_block_of_a_trace_is_the_same_text(any_tokenizer: Path, tmp_path: Path) -> None:
    file = mooncake(tmp_path, (1100, [1, 2, 3]), (1300, [1, 2, 4]), (1030, [1, 5, 6]), (600, [7, 8]))
    for templated in (True, False):
        found = opened(file, any_tokenizer, templated=templated).take(4)
        a, b, c, d = (ids(any_tokenizer, first_text(x), special=not templated) for x in found)
        assert [len(x) for x in (a, b, c, d)] == [1100, 1300, 1030, 600]
        # The blocks are cut one by one: where two meet, a token more or less.
        assert a[:1020] == b[:1020]
        assert a[:508] == c[:508]
        assert a[520:600] != c[520:600]
        assert a[1030:1040] != b[1030:1040]
        assert a[:8] != d[:8]


def test_a_block_keeps_its_text_when_it_has_been_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = mooncake(tmp_path, (1100, [1, 2, 3]), (1100, [4, 5, 6]), (1100, [1, 2, 7]))
    first, _, again = opened(file).take(3)
    monkeypatch.setattr("llmopt.bench.workload.source._BLOCKS_KEPT", 1)
    assert opened(file).take(1) == [first]
    assert first_text(first)[:4000] == first_text(again)[:4000]


def test_a_trace_keeps_times_and_lengths_and_ends(tmp_path: Path) -> None:
    source = opened(mooncake(tmp_path, (5, [1]), (700, [2, 3])))
    assert (source.size, source.timed) == (2, True)
    found = source.take(10)
    assert [c.at_s for c in found] == [0.0, 0.1]
    assert [c.turns[0].output_tokens for c in found] == [3, 4]
    assert [len(first_text(c)) for c in found] == [20, 2800]


def test_an_output_length_that_is_given_wins_over_that_of_a_file(tmp_path: Path) -> None:
    workload = resolve(mooncake(tmp_path, (5, [1]), (7, [2])), output_tokens=9)
    assert {c.turns[0].output_tokens for c in opened(workload).take(2)} == {9}


def test_a_request_of_a_trace_too_short_for_the_special_tokens_is_a_little_longer(
    any_tokenizer: Path, tmp_path: Path
) -> None:
    for conversation in opened(mooncake(tmp_path, (1, [1]), (513, [2, 3])), any_tokenizer).take(2):
        tokens = len(ids(any_tokenizer, first_text(conversation)))
        assert conversation.turns[0].prompt_tokens == tokens
        assert tokens % 512 <= 5


def test_a_trace_without_blocks_has_prompts_that_share_nothing(any_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("Timestamp,Request tokens,Response tokens\n" + "".join(f"{i},{40 + i},5\n" for i in range(30)))
    found = opened(str(file), any_tokenizer).take(30)
    assert [len(ids(any_tokenizer, first_text(c))) for c in found] == list(range(40, 70))
    assert len({first_text(c)[:8] for c in found}) == 30


def test_what_a_file_leaves_out_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("Timestamp,Request tokens,Response tokens\n1,5,0\n2,5,5\n")
    assert opened(str(file)).notes == ("`trace.csv`: 1 rows without an answer are left out",)


def test_texts_of_ones_own_are_sent_as_they_are_and_begin_again(tmp_path: Path) -> None:
    source = opened(rows(tmp_path, {"prompt": "a"}, {"prompt": "b", "output_tokens": 5}))
    assert (source.size, source.timed) == (2, False)
    found = source.take(5)
    assert [first_text(c) for c in found] == ["a", "b", "a", "b", "a"]
    assert [c.number for c in found] == [0, 1, 0, 1, 0]
    assert [c.turns[0].output_tokens for c in found[:2]] == [64, 5]


def test_texts_with_times_end(tmp_path: Path) -> None:
    source = opened(rows(tmp_path, {"prompt": "a", "at_s": 10}, {"prompt": "b", "at_s": 12.5}))
    assert [c.at_s for c in source.take(5)] == [0.0, 2.5]


def test_turns_bound_how_much_of_a_conversation_is_sent(tmp_path: Path) -> None:
    file = rows(tmp_path, *({"prompt": str(i), "session": 1} for i in range(5)))
    assert [len(opened(resolve(file, turns=turns)).take(1)[0].turns) for turns in (None, 2)] == [5, 2]


def test_without_a_template_messages_are_set_apart(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "why"}]
    file = rows(tmp_path, {"messages": messages, "session": 1}, {"prompt": "and", "session": 1})
    (plain,) = opened(file).take(1)
    assert first_text(plain) + "ANSWER" + plain.turns[1].said[0][1] == "brief\n\nwhyANSWER\n\nand"
    (chat,) = opened(file, templated=True).take(1)
    assert chat.turns[0].said == (("system", "brief"), ("user", "why"))


def test_a_recorded_answer_says_how_long_the_answer_is_to_be(tokenizer_file: Path, tmp_path: Path) -> None:
    answer = "return the value of the function"
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": answer}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    (found,) = opened(str(tmp_path / "a.json"), tokenizer_file).take(1)
    assert found.turns[0].output_tokens == len(ids(tokenizer_file, answer, special=False))
    (guessed,) = opened(str(tmp_path / "a.json")).take(1)
    assert guessed.turns[0].output_tokens == len(answer) // 4


def test_a_bad_row_is_found_before_anything_is_taken(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match=r"rows.jsonl:2: "):
        opened(rows(tmp_path, {"prompt": "a"}, {"promt": "b"}))
