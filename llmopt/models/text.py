"""From texts to windows of token ids, with the checkpoint's own tokenizer, and a set of windows as a folder.

A calibration set is a folder with `calibration.safetensors`, whose one tensor `input_ids` is int32 [samples, seq_len],
and `calibration.json`, which says how it was made.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENS_FILE = "calibration.safetensors"
_TOKENS = "input_ids"


def read_tokens(model: Path, text: Path) -> np.ndarray:
    """All tokens of a UTF-8 text, int64, special tokens as the tokenizer adds them to one text."""
    if not text.is_file():
        raise LlmoptError(f"no text file at `{text}`", hint="give a UTF-8 text file")
    tokenizer = open_tokenizer(model)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LlmoptError(f"`{text}` is not UTF-8 text", hint="convert it, for example with `iconv -t utf-8`") from None
    return np.array(tokenizer.encode(content).ids, np.int64)


def open_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model's folder, without the cutting and padding that it may have been saved with."""
    from tokenizers import Tokenizer

    file = tokenizer_file(model)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise LlmoptError(f"`{file}` cannot be read: {error}", hint="save the tokenizer again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_file(model: Path) -> Path:
    file = model / "tokenizer.json"
    if not file.is_file():
        raise LlmoptError(
            f"no `tokenizer.json` in `{model}`",
            hint="save the tokenizer with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`",
        )
    return file


def windows(tokens: np.ndarray, *, count: int, length: int, seed: int | None, what: str) -> np.ndarray:
    """[count, length] windows that do not overlap: drawn with `seed`, or the first ones.

    Raises LlmoptError when the text is too short; `what` names it.
    """
    available = len(tokens) // length
    if available < count:
        raise LlmoptError(
            f"the {what} is too short: {len(tokens)} tokens make {available} windows of {length}, not {count}",
            hint=f"give a longer text, or ask for at most {available} windows" if available else "give a longer text",
        )
    chosen = np.arange(count) if seed is None else np.random.Generator(np.random.PCG64(seed)).permutation(available)
    return tokens[: available * length].reshape(available, length)[np.sort(chosen[:count])]


def join(parts: Iterable[list[int]], *, enough: int, separator: int | None) -> tuple[np.ndarray, int]:
    """Texts as token ids, joined until there are `enough` tokens: the stream, int64, and how many texts are in it."""
    stream: list[int] = []
    used = 0
    for ids in parts:
        if used and separator is not None and stream and stream[-1] != separator:
            stream.append(separator)
        stream += ids
        used += 1
        if len(stream) >= enough:
            break
    return np.array(stream, np.int64), used


def write_calibration(folder: Path, ids: np.ndarray) -> None:
    """Token ids [samples, seq_len] as safetensors, the same bytes for the same ids."""
    data = ids.astype("<i4").tobytes()
    entry = {_TOKENS: {"dtype": "I32", "shape": list(ids.shape), "data_offsets": [0, len(data)]}}
    header = json.dumps(entry, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    (folder / TOKENS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + data)


def read_calibration(folder: Path) -> np.ndarray:
    """Token ids [samples, seq_len], int64, of a calibration set; LlmoptError for a folder that is none."""
    file = folder / TOKENS_FILE
    info = read_header(file).get(_TOKENS)
    if info is None or info.dtype not in ("I32", "I64") or len(info.shape) != 2:
        raise LlmoptError(
            f"`{file}` has no token ids `{_TOKENS}` of two dimensions", hint="make the calibration set again"
        )
    flat = np.fromfile(file, np.int32 if info.dtype == "I32" else np.int64, offset=info.offset, count=-1)
    return flat[: info.shape[0] * info.shape[1]].reshape(info.shape).astype(np.int64)
