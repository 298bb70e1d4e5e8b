"""Prompts: slices of a text, each of an exact number of tokens, and no two with the same beginning."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import LlmoptError
from llmopt.profiles import HELDOUT_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 4  # where no tokenizer tells
_ATTEMPTS = 6  # moves of a slice's end before another beginning is tried


class Prompts:
    """An endless source of prompts: the same seed gives the same sequence.

    A prompt begins at a random word of `text`, so that none shares its beginning with another and a server's prefix
    cache has nothing to find. `exact` says whether they are `tokens` long by a tokenizer, the special tokens that it
    adds included (for a chat, `special=False`: the template adds them), or only by length in characters.
    """

    def __init__(
        self, tokenizer: Path | None, *, tokens: int, seed: int, special: bool, text: str | None = None
    ) -> None:
        self._text = HELDOUT_TEXT.read_text(encoding="utf-8") if text is None else text
        self._tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self._tokens = tokens
        self._special = special
        self._starts = _starts(self._text, seed)

    @property
    def exact(self) -> bool:
        return self._tokenizer is not None

    def take(self, count: int) -> list[str]:
        return [self._one() for _ in range(count)]

    def _one(self) -> str:
        for _ in range(100):
            start = next(self._starts)
            prompt = self._cut(start) if self._tokenizer is None else self._exact(start, self._tokenizer)
            if prompt is not None:
                return prompt
        raise LlmoptError(
            f"no slice of the text has exactly {self._tokens} tokens with this tokenizer",
            hint="use another `prompt_tokens`; its special tokens count too",
        )

    def _cut(self, start: int) -> str:
        return self._from(start, CHARACTERS_PER_TOKEN * self._tokens)

    def _exact(self, start: int, tokenizer: Tokenizer) -> str | None:
        """The text from `start` to a token's end, such that encoding it anew gives the count; None if no end does."""
        added = tokenizer.num_special_tokens_to_add(False) if self._special else 0
        wanted = self._tokens - added
        window = self._from(start, 8 * self._tokens + 64)
        ends = [end for _, end in tokenizer.encode(window, add_special_tokens=False).offsets]
        last = wanted
        for _ in range(_ATTEMPTS):
            if not 1 <= last <= len(ends):
                return None
            prompt = window[: ends[last - 1]]
            surplus = len(tokenizer.encode(prompt, add_special_tokens=self._special).ids) - self._tokens
            if surplus == 0:
                return prompt
            last -= surplus
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


def _starts(text: str, seed: int) -> Iterator[int]:
    """The beginnings of words in random order, without end; all of them before any comes again."""
    words = [0, *(match.end() for match in re.finditer(r"\s+(?=\S)", text))]
    # Of the words that begin the same text only one is taken: their prompts would share it.
    order = list({text[start : start + 24]: start for start in words}.values())
    rng = random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from order
