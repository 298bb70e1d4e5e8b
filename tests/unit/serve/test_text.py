"""Text from tokens: equal to the whole's decoding, piece by piece."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llmopt.errors import LlmoptError
from llmopt.serve.text import Detokenizer, StopStrings, Vocabulary


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool call é>"), AddedToken("plain")])
    return tokenizer


def sentence_piece() -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"▁": 256, "▁the": 257, "re": 258, "é": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.from_tokenizer(json.loads(tokenizer.to_str()))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary(tokenizer))
    return [detokenizer.push(i) for i in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("seed", range(20))
def test_any_byte_level_tokens_decode_as_the_library_decodes_the_whole(seed: int) -> None:
    tokenizer = byte_level()
    ids = random.Random(seed).choices(range(tokenizer.get_vocab_size()), k=60)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", ["the café, the 東京 and 🙂🙂", "  the two  spaces ", "e\u0301 and \u200d"])
def test_every_piece_of_a_text_in_single_bytes_is_whole_characters(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    byte_ids = {b: i for i, b in enumerate(vocabulary(tokenizer).pieces) if len(b) == 1}
    shown = pieces(tokenizer, [byte_ids[bytes([byte])] for byte in text.encode()])
    expected = text.removeprefix(" ") if make is sentence_piece else text
    assert "".join(shown) == expected
    assert all("\ufffd" not in piece for piece in shown)


def test_sentence_piece_tokens_decode_as_the_library_decodes_the_whole() -> None:
    tokenizer = sentence_piece()
    ids = [260, 257, 258, 257, 256, 259, 0xE2, 0x82, 0xAC, 257]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "there the é€ the"


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("東").ids
    assert pieces(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_a_token_beyond_the_tokenizer_has_no_text() -> None:
    assert Detokenizer(vocabulary(byte_level())).push(100_000) == ""


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_decoder_that_joins_tokens_is_refused(decoder: object) -> None:
    with pytest.raises(LlmoptError, match="cannot stream text") as error:
        Vocabulary.from_tokenizer({"model": {"vocab": {"a": 0}}, "decoder": decoder})
    assert error.value.hint


@pytest.mark.parametrize("cuts", range(12))
def test_a_stop_string_is_found_wherever_the_text_is_cut(cuts: int) -> None:
    text = "one two END three"
    stops, shown, stopped = StopStrings(["END", "zebra"]), "", False
    for part in (text[:cuts], text[cuts:]):
        if not stopped:
            more, stopped = stops.push(part)
            shown += more
    assert (shown, stopped) == ("one two ", True)


def test_what_only_began_a_stop_string_is_shown_in_the_end() -> None:
    stops = StopStrings(["ENDING"])
    assert stops.push("the END") == ("the ", False)
    assert stops.finish() == "END"


def test_the_earliest_stop_string_cuts() -> None:
    assert StopStrings(["three", "two"]).push("one two three") == ("one ", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("anything") == ("anything", False)
