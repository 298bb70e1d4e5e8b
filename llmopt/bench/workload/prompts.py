"""Prompts: slices of a text, each of an exact number of tokens, and no two with the same beginning."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmopt.errors import LlmoptError
from llmopt.profiles import HELDOUT_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 4  # where no tokenizer tells
_CHARACTERS_SEEN = 8  # of the text for each token of a slice: more than a token has on average
_ENDS = 6  # tried before another beginning
_STARTS = 100  # tried before it is said that no slice fits
_NAMED_STARTS = 8
_DOT = "."  # stands for a text before a slice that is not known yet


class _Window(NamedTuple):
    """Where a slice is cut: behind `lead`, from `start` of the text on, for use after a text of some tokens."""

    start: int
    lead: str
    after: str
    after_tokens: int


class Cutter:
    """Cuts slices of `text` to a number of tokens: the same seed and calls give the same slices.

    A slice begins at a random word, so that none shares its beginning with another and a server's prefix cache has
    nothing to find. `exact` says whether their length is exact by a tokenizer, or only right in characters.
    """

    def __init__(self, tokenizer: Path | None, *, seed: int, text: str | None = None) -> None:
        self._text = _heldout() if text is None else text
        self._tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self._words = _words(self._text)
        self._starts = _shuffled(self._words, seed)
        self._dot = self.count(_DOT, special=False)

    @property
    def exact(self) -> bool:
        return self._tokenizer is not None

    def cut(self, tokens: int, *, special: bool, after: str = "") -> str:
        """A slice which makes `after` and itself `tokens` long together, and leaves the tokens of `after` as they are.

        `special`: the special tokens that the tokenizer adds to a request are among them (for a chat they are not:
        the template adds them).
        """
        before = self._ids(after, special=special) if after else []
        for _ in range(_STARTS):
            window = _Window(next(self._starts), " " if after else "", after, len(before))
            found = self._fit(window, tokens, special=special)
            if found is not None and _begins(found[1], before):
                return found[0]
        raise LlmoptError(
            f"no slice of the text has exactly {tokens} tokens with this tokenizer",
            hint="use another `prompt_tokens`; its special tokens count too",
        )

    def cut_on(self, tokens: int) -> str:
        """A slice of so many tokens that goes on after a text which is not known yet."""
        return self.cut(tokens + self._dot, special=False, after=_DOT)

    def cut_named(self, name: str, tokens: int, *, special: bool, after: str = "", after_tokens: int = 0) -> str | None:
        """The slice of that name: always the same one, which begins as no other. None where no end fits.

        `after` has about `after_tokens`; what becomes of them is not looked at, as it is in `cut`.
        """
        lead = f" {name}: " if after else f"{name}: "
        for attempt in range(_NAMED_STARTS):
            start = self._words[random.Random(f"{name} {attempt}").randrange(len(self._words))]
            found = self._fit(_Window(start, lead, after, after_tokens), tokens, special=special)
            if found is not None:
                return found[0]
        return None

    def cut_named_on(self, name: str, tokens: int) -> str | None:
        """`cut_on` with a name."""
        return self.cut_named(name, tokens + self._dot, special=False, after=_DOT, after_tokens=self._dot)

    def count(self, text: str, *, special: bool) -> int:
        if self._tokenizer is None:
            return -(-len(text) // CHARACTERS_PER_TOKEN)
        return len(self._ids(text, special=special))

    def special_tokens(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before a text, and how many behind it."""
        if self._tokenizer is None:
            return 0, 0
        before = self._tokenizer.encode("a", add_special_tokens=True).special_tokens_mask.index(0)
        return before, self._tokenizer.num_special_tokens_to_add(False) - before

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return [] if self._tokenizer is None else self._tokenizer.encode(text, add_special_tokens=special).ids

    def _fit(self, window: _Window, tokens: int, *, special: bool) -> tuple[str, list[int]] | None:
        """The window's text up to a token's end, such that encoding it anew after `after` gives the count; those ids.

        None if no end does.
        """
        if self._tokenizer is None:
            characters = CHARACTERS_PER_TOKEN * tokens - len(window.after)
            text = (window.lead + self._from(window.start, characters))[:characters]
            return (text, []) if characters > 0 else None
        last = tokens - window.after_tokens
        if special and not window.after:
            last -= self._tokenizer.num_special_tokens_to_add(False)
        if last < 1:
            return None
        text = window.lead + self._from(window.start, _CHARACTERS_SEEN * last + 64)
        ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        for _ in range(_ENDS):
            if not 1 <= last <= len(ends) or not ends[last - 1]:
                return None
            ids = self._ids(window.after + text[: ends[last - 1]], special=special)
            if len(ids) == tokens:
                return text[: ends[last - 1]], ids
            last -= len(ids) - tokens
        return None

    def _from(self, start: int, characters: int) -> str:
        """`characters` of the text from `start`; behind its end the text begins again."""
        piece = self._text[start : start + characters]
        while len(piece) < characters:
            piece += "\n" + self._text[: characters - len(piece) - 1]
        return piece


@cache
def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without its truncation and padding."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise LlmoptError(f"`{file}` is not a tokenizer: {error}", hint="it should be a `tokenizer.json`") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _begins(ids: list[int], before: list[int]) -> bool:
    """Whether `ids` begin with those before; a special token at the very end of `before` has moved to the end."""
    return ids[: len(before)] == before or (ids[: len(before) - 1] == before[:-1] and ids[-1:] == before[-1:])


@cache
def _heldout() -> str:
    return HELDOUT_TEXT.read_text(encoding="utf-8")


@lru_cache(maxsize=2)
def _words(text: str) -> tuple[int, ...]:
    """The beginnings of words. Of those that begin the same text only one is taken: their slices would share it."""
    words = [0, *(match.end() for match in re.finditer(r"\s+(?=\S)", text))]
    return tuple({text[start : start + 24]: start for start in words}.values())


def _shuffled(words: tuple[int, ...], seed: int) -> Iterator[int]:
    """Words in random order, without end; all of them before any comes again."""
    order = list(words)
    rng = random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from order
