"""From token ids to text, one token at a time: what has been sent is never taken back, and never half a character.

A tokenizer.json is reduced to a table of bytes per token, so that a token costs a lookup and an incremental UTF-8
decoder does the rest. The concatenation of the pieces is the decoded whole by construction.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.errors import LlmoptError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Bytes of each token id; empty for special tokens and ids that the tokenizer does not know."""

    pieces: tuple[bytes, ...]
    strip_first_space: bool  # SentencePiece puts a space before the first word

    @classmethod
    def from_tokenizer(cls, tokenizer: Mapping[str, Any]) -> Vocabulary:
        """From the contents of a tokenizer.json. Raises LlmoptError for a decoder that works on more than one token."""
        decoders = {d.get("type"): d for d in _flatten(tokenizer.get("decoder"))}
        tokens = _tokens(tokenizer)
        if "ByteLevel" in decoders:
            table = {char: byte for byte, char in enumerate(_byte_chars())}
            pieces = {i: _byte_level(token, table) for i, token in tokens.items()}
        elif decoders and decoders.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
            fallback = "ByteFallback" in decoders
            pieces = {i: _sentence_piece(token, fallback) for i, token in tokens.items()}
        else:
            names = ", ".join(f"`{name}`" for name in decoders) or "none"
            raise LlmoptError(
                f"cannot stream text of a tokenizer with the decoder {names}",
                hint="tokenizers with a `ByteLevel`, `ByteFallback` or `Metaspace` decoder can be served",
            )
        for added in tokenizer.get("added_tokens", []):
            if added["special"]:
                pieces[added["id"]] = b""
        metaspace = decoders.get("Metaspace")
        strip = "Strip" in decoders or (metaspace is not None and metaspace.get("prepend_scheme") != "never")
        return cls(tuple(pieces.get(i, b"") for i in range(max(pieces) + 1)), strip)


class Detokenizer:
    """The text of one completion as its tokens come in."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._strip = vocabulary.strip_first_space
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        """What can be shown now; an unfinished character is held back."""
        return self._text(self._pieces[token] if token < len(self._pieces) else b"", False)

    def finish(self) -> str:
        """What was held back, replaced by U+FFFD where no more bytes can complete it."""
        return self._text(b"", True)

    def _text(self, piece: bytes, final: bool) -> str:
        text = self._decode(piece, final)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Cuts a text at the first stop string, which may begin in one piece and end in a later one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has been found; nothing is shown after it."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def finish(self) -> str:
        """What was held back because a stop string might have begun."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _tokens(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, dict):
        tokens = {i: token for token, i in vocab.items()}
    else:  # Unigram: [[token, score], ...]
        tokens = {i: token for i, (token, _) in enumerate(vocab)}
    return tokens | {added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])}


def _flatten(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _flatten(inner)
    else:
        yield decoder


def _byte_chars() -> str:
    """The printable stand-in of each byte, as GPT-2's tokenizer chose them (`bytes_to_unicode` in its encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = iter(range(256, 512))
    return "".join(chr(byte if byte in kept else next(moved)) for byte in range(256))


def _byte_level(token: str, table: Mapping[str, int]) -> bytes:
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()  # an added token, written as it is


def _sentence_piece(token: str, fallback: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token) if fallback else None
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
