"""From text to windows of token ids, with the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmopt.errors import LlmoptError


def read_tokens(model: Path, text: Path) -> np.ndarray:
    """All tokens of a UTF-8 text, int64, special tokens as the tokenizer adds them to one text."""
    from tokenizers import Tokenizer

    if not text.is_file():
        raise LlmoptError(f"no text file at `{text}`", hint="give a UTF-8 text file")
    file = model / "tokenizer.json"
    if not file.is_file():
        raise LlmoptError(
            f"no `tokenizer.json` in `{model}`",
            hint="save the tokenizer with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`",
        )
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LlmoptError(f"`{text}` is not UTF-8 text", hint="convert it, for example with `iconv -t utf-8`") from None
    return np.array(Tokenizer.from_file(str(file)).encode(content).ids, np.int64)


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
