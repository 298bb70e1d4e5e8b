"""The calibration set of a quantization: token ids drawn from texts, kept as an artifact of its own.

A plain text is tokenized whole and cut into windows that do not overlap, of which some are drawn. The rows of a data
set are drawn first and tokenized one by one until there are tokens enough, joined by the end-of-sequence token and cut:
so a set of any size costs no more than what is taken from it. The same files, tokenizer and settings give the same ids.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmopt.artifacts.outcome import Json, Outcome, Progress, silent
from llmopt.errors import LlmoptError
from llmopt.profiles.settings import to_json

if TYPE_CHECKING:
    import numpy as np

    from llmopt.models.chat import ChatTemplate

OP_VERSION = 1
ABOUT_FILE = "calibration.json"
#: A template may ask for the date, which may not change the ids.
_TODAY = datetime.datetime(2025, 1, 1)
_ROWS_AT_ONCE = 64

Packing = Literal["text", "rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSettings:
    """The last three are of rows only."""

    samples: int
    seq_len: int
    seed: int
    packing: Packing
    field: str | None = None  # of a row: its text, or its messages; None: `text` if it has one, else `messages`
    eos_token_id: int | None = None  # between two rows


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids [samples, seq_len], and which rows they are from, in their order (none of a plain text)."""

    ids: np.ndarray
    rows: tuple[int, ...] = ()
    events: tuple[str, ...] = ()


def deps(settings: CalibrationSettings, *, chat: bool) -> tuple[str, ...]:
    """The distributions whose versions may change the ids."""
    return ("numpy", "tokenizers", *(("jinja2",) if chat else ()))


def make(model: Path, files: Sequence[Path], settings: CalibrationSettings) -> Calibration:
    """The set that `files` make with the tokenizer (and the chat template) in `model`; LlmoptError if they do not."""
    from llmopt.models.text import read_tokens, windows

    if settings.packing == "rows":
        return _from_rows(model, files, settings)
    tokens = read_tokens(model, files[0])
    ids = windows(tokens, count=settings.samples, length=settings.seq_len, seed=settings.seed, what="calibration text")
    return Calibration(ids)


def write(calibration: Calibration, about: Mapping[str, Json], out: Path, progress: Progress) -> Outcome:
    """The folder of the set; `about` says of what and how it was made."""
    from llmopt.artifacts.manifest import canonical_json
    from llmopt.models.text import write_calibration

    write_calibration(out, calibration.ids)
    (out / ABOUT_FILE).write_bytes(canonical_json({**about, "rows_used": list(calibration.rows)}) + b"\n")
    samples, seq_len = calibration.ids.shape
    progress(f"{samples} windows of {seq_len} tokens")
    return Outcome(metrics={"tokens": samples * seq_len, "rows": len(calibration.rows)}, events=calibration.events)


def from_text(model: Path, text: Path, out: Path, *, samples: int, seq_len: int, seed: int = 0) -> Path:
    """The set of a plain text in the new folder `out`, for who calls `quantizers.quantize` without a store."""
    settings = CalibrationSettings(samples=samples, seq_len=seq_len, seed=seed, packing="text")
    out.mkdir(parents=True)
    write(make(model, [text], settings), to_json(settings), out, silent)
    return out


def read_about(folder: Path) -> dict[str, Any]:
    """What `calibration.json` says; loads no numpy."""
    from llmopt.models.companions import read_json

    about = read_json(folder / ABOUT_FILE)
    if not all(isinstance(about.get(name), int) for name in ("samples", "seq_len")):
        raise LlmoptError(f"`{folder}` is no calibration set: `{ABOUT_FILE}` does not say its size")
    return about


def eos_token_id(model: Path) -> int | None:
    """What ends a text, by the model's own config files."""
    from llmopt.models.companions import read_json

    config = read_json(model / "config.json")
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, dict) else {}, read_json(model / "generation_config.json")):
        value = values.get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _from_rows(model: Path, files: Sequence[Path], settings: CalibrationSettings) -> Calibration:
    import numpy as np

    from llmopt.models.text import join, open_tokenizer, windows

    rows = _Rows([_open(file, settings.field) for file in files])
    if not len(rows):
        raise LlmoptError(f"no rows in `{files[0].name}`", hint="give a file with a row a line")
    order = [int(row) for row in np.random.Generator(np.random.PCG64(settings.seed)).permutation(len(rows))]
    tokenizer, text_of = open_tokenizer(model), _Texts(model, settings.field, files[0].name)

    def tokens() -> Iterator[list[int]]:
        for start in range(0, len(order), _ROWS_AT_ONCE):
            texts = [text_of(rows[row]) for row in order[start : start + _ROWS_AT_ONCE]]
            # A template writes the special tokens itself.
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=not text_of.chat):
                yield encoding.ids

    wanted = settings.samples * settings.seq_len
    stream, used = join(tokens(), enough=wanted, separator=settings.eos_token_id)
    ids = windows(stream, count=settings.samples, length=settings.seq_len, seed=None, what="calibration text")
    events = () if settings.eos_token_id is not None else ("rows joined without a token between: the model names none",)
    return Calibration(ids, tuple(order[:used]), events)


class _Texts:
    """The text of a row: its field as it is, or its messages through the model's chat template."""

    def __init__(self, model: Path, field: str | None, file: str) -> None:
        self._model, self._field, self._file = model, field, file
        self.chat = False

    def __call__(self, row: Mapping[str, Any]) -> str:
        field = self._field or ("text" if "text" in row else "messages")
        value = row.get(field)
        if isinstance(value, str) or (value is None and field in row):
            return value or ""
        if isinstance(value, list):
            return self._render(value, field)
        names = ", ".join(f"`{name}`" for name in list(row)[:12])
        raise LlmoptError(
            f"a row of `{self._file}` has no text in `{field}`", hint=f"name one with `--calib-field`: it has {names}"
        )

    def _render(self, messages: list[Any], field: str) -> str:
        from llmopt.models.chat import TemplateRefusedError

        self.chat = True
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
            raise LlmoptError(
                f"`{field}` in a row of `{self._file}` is no list of messages with `role` and `content`",
                hint="name a field with a text with `--calib-field`",
            )
        try:
            return self._template.render(messages, {}, generation_prompt=False)
        except TemplateRefusedError as error:
            raise LlmoptError(
                f"the chat template refuses a row of `{self._file}`: {error}", hint="use a field with a text"
            ) from None

    @cached_property
    def _template(self) -> ChatTemplate:
        from llmopt.models.chat import ChatTemplate, TemplateSource

        source = TemplateSource.read(self._model)
        if source is None:
            raise LlmoptError(
                f"`{self._file}` has messages, and the model has no chat template",
                hint="name a field with a text with `--calib-field`, or put a `chat_template.jinja` beside the model",
            )
        return ChatTemplate(source, today=_TODAY)


class _File(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


class _Rows:
    """The rows of all files as one sequence."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files

    def __len__(self) -> int:
        return sum(len(file) for file in self._files)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        for file in self._files:
            if row < len(file):
                return file[row]
            row -= len(file)
        raise IndexError(row)


def _open(file: Path, field: str | None) -> _File:
    if file.name.endswith(".parquet"):
        return _Parquet(file, field)
    return _JsonLines(file)


class _JsonLines:
    """A JSON object a line, packed with gzip or not. Only the places of the lines are kept of a file that is not."""

    def __init__(self, file: Path) -> None:
        import gzip

        self._file = file
        self._lines: list[bytes] = []
        self._starts: list[int] = []
        try:
            if file.name.endswith(".gz"):
                with gzip.open(file) as packed:
                    self._lines = [line for line in packed if line.strip()]
                return
            with file.open("rb") as stream:
                start = 0
                for line in stream:
                    if line.strip():
                        self._starts.append(start)
                    start += len(line)
        except (OSError, EOFError) as error:
            raise LlmoptError(f"`{file}` cannot be read: {error}", hint="is it whole?") from None

    def __len__(self) -> int:
        return len(self._lines) or len(self._starts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if self._lines:
            line = self._lines[row]
        else:
            with self._file.open("rb") as stream:
                stream.seek(self._starts[row])
                line = stream.readline()
        try:
            value = json.loads(line)
        except ValueError as error:
            raise LlmoptError(
                f"row {row + 1} of `{self._file}` is not JSON: {error}", hint="one object a line"
            ) from None
        if not isinstance(value, dict):
            raise LlmoptError(f"row {row + 1} of `{self._file}` is not a JSON object", hint="one object a line")
        return value


class _Parquet:
    """The one column of a parquet file that is asked for."""

    def __init__(self, file: Path, field: str | None) -> None:
        import pyarrow
        from pyarrow import parquet

        try:
            opened = parquet.ParquetFile(file)
            names = opened.schema_arrow.names
            self._name = field or ("text" if "text" in names else "messages")
            if self._name not in names:
                listed = ", ".join(f"`{name}`" for name in names[:12])
                raise LlmoptError(
                    f"`{file.name}` has no column `{self._name}`",
                    hint=f"name one with `--calib-field`: it has {listed}",
                )
            self._column = opened.read(columns=[self._name]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise LlmoptError(f"`{file}` cannot be read as parquet: {error}", hint="is it whole?") from None

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return {self._name: self._column[row].as_py()}
