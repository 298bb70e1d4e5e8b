from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.bench.workload.prompts import Prompts, load_tokenizer
from llmopt.errors import LlmoptError


@pytest.mark.parametrize("tokens", [2, 17, 128, 700])
def test_prompts_have_exactly_the_tokens_asked_for_with_the_special_ones(tokenizer_file: Path, tokens: int) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    for prompt in Prompts(tokenizer_file, tokens=tokens, seed=1, special=True).take(20):
        assert len(tokenizer.encode(prompt).ids) == tokens


def test_prompts_of_a_chat_leave_the_special_tokens_to_the_template(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    for prompt in Prompts(tokenizer_file, tokens=50, seed=1, special=False).take(5):
        assert len(tokenizer.encode(prompt, add_special_tokens=False).ids) == 50


def test_prompts_may_be_longer_than_the_text(tokenizer_file: Path) -> None:
    source = Prompts(tokenizer_file, tokens=300, seed=1, special=True, text="a short text of nine words and no more")
    for prompt in source.take(3):
        assert len(load_tokenizer(tokenizer_file).encode(prompt).ids) == 300


def test_no_two_prompts_begin_alike(tokenizer_file: Path) -> None:
    for file in (tokenizer_file, None):
        prompts = Prompts(file, tokens=64, seed=0, special=True).take(400)
        assert len({prompt[:24] for prompt in prompts}) == 400


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, same, other = (Prompts(None, tokens=16, seed=seed, special=True).take(10) for seed in (3, 3, 4))
    assert first == same
    assert not set(first) & set(other)


def test_without_a_tokenizer_a_token_is_taken_for_four_characters() -> None:
    source = Prompts(None, tokens=100, seed=0, special=True)
    assert not source.exact
    assert {len(prompt) for prompt in source.take(20)} == {400}


def test_a_length_that_the_special_tokens_fill_is_an_error(tokenizer_file: Path) -> None:
    with pytest.raises(LlmoptError, match="no slice of the text has exactly 1 tokens"):
        Prompts(tokenizer_file, tokens=1, seed=0, special=True).take(1)


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(LlmoptError, match="is not a tokenizer"):
        Prompts(file, tokens=8, seed=0, special=True)


def test_truncation_in_the_file_does_not_shorten_prompts(tokenizer_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = Prompts(tmp_path / "tokenizer.json", tokens=64, seed=0, special=True).take(1)[0]
    assert len(load_tokenizer(tokenizer_file).encode(prompt).ids) == 64
