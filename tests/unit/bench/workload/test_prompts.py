from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.bench.workload.prompts import Cutter, load_tokenizer
from llmopt.errors import LlmoptError


def ids(tokenizer: Path, text: str, *, special: bool = True) -> list[int]:
    found: list[int] = load_tokenizer(tokenizer).encode(text, add_special_tokens=special).ids
    return found


def cut(tokenizer: Path | None, tokens: int, *, count: int = 10, seed: int = 0, special: bool = True) -> list[str]:
    cutter = Cutter(tokenizer, seed=seed)
    return [cutter.cut(tokens, special=special) for _ in range(count)]


@pytest.mark.parametrize("tokens", [4, 17, 128, 700])
def test_slices_have_exactly_the_tokens_asked_for_with_the_special_ones(any_tokenizer: Path, tokens: int) -> None:
    assert {len(ids(any_tokenizer, text)) for text in cut(any_tokenizer, tokens, count=20)} == {tokens}


def test_a_slice_of_one_token_and_a_special_one_is_found(tokenizer_file: Path) -> None:
    assert {len(ids(tokenizer_file, text)) for text in cut(tokenizer_file, 2)} == {2}


def test_slices_for_a_chat_leave_the_special_tokens_to_the_template(any_tokenizer: Path) -> None:
    found = cut(any_tokenizer, 50, special=False)
    assert {len(ids(any_tokenizer, text, special=False)) for text in found} == {50}


def test_slices_may_be_longer_than_the_text(any_tokenizer: Path) -> None:
    cutter = Cutter(any_tokenizer, seed=1, text="a short text of nine words and no more")
    assert len(ids(any_tokenizer, cutter.cut(300, special=True))) == 300


def test_no_two_slices_begin_alike(tokenizer_file: Path) -> None:
    for file in (tokenizer_file, None):
        assert len({text[:24] for text in cut(file, 64, count=400)}) == 400


def test_the_same_seed_gives_the_same_slices_and_another_seed_others() -> None:
    first, same, other = (cut(None, 16, seed=seed) for seed in (3, 3, 4))
    assert first == same
    assert not set(first) & set(other)


def test_without_a_tokenizer_a_token_is_taken_for_four_characters() -> None:
    assert not Cutter(None, seed=0).exact
    assert {len(text) for text in cut(None, 100)} == {400}


def test_a_slice_after_a_text_fills_it_up_and_leaves_its_tokens_alone(tokenizer_file: Path) -> None:
    cutter = Cutter(tokenizer_file, seed=0)
    for before in ("def f(x):\n    ret", "ends with a space ", "ends with a line\n", "1234", "x."):
        text = before + cutter.cut(40, special=True, after=before)
        assert len(ids(tokenizer_file, text)) == 40
        assert ids(tokenizer_file, text)[: len(ids(tokenizer_file, before))] == ids(tokenizer_file, before)


def test_a_named_slice_is_always_the_same_and_begins_as_no_other(any_tokenizer: Path) -> None:
    one, other = (Cutter(any_tokenizer, seed=seed) for seed in (0, 1))
    other.cut(9, special=True)
    names = [str(number) for number in range(50)]
    found = [one.cut_named(name, 30, special=False) for name in names]
    assert found == [other.cut_named(name, 30, special=False) for name in names]
    assert len({text[:6] for text in found if text is not None}) == 50


def test_a_length_that_the_special_tokens_fill_is_an_error(any_tokenizer: Path) -> None:
    with pytest.raises(LlmoptError, match="no slice of the text has exactly 1 tokens"):
        cut(any_tokenizer, 1)


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(LlmoptError, match="is not a tokenizer"):
        Cutter(file, seed=0)


def test_truncation_in_the_file_does_not_shorten_slices(tokenizer_file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (text,) = cut(tmp_path / "tokenizer.json", 64, count=1)
    assert len(ids(tokenizer_file, text)) == 64
