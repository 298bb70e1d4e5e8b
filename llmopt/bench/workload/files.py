"""Files of a workload: conversations with their texts, or traces that tell times and lengths only.

`.jsonl`: a row a request, {"prompt": ...} or {"messages": [...]}, with "output_tokens", "at_s", "session" and "think_s"
where one likes: rows of one session are turns of one conversation. `.json`: ShareGPT. Traces: Mooncake `.jsonl`
(github.com/kvcache-ai/Mooncake), BurstGPT `.csv` (arXiv:2401.17644) and Azure `.csv` (AzurePublicDataset).
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from llmopt.errors import LlmoptError, nearest

#: (role, text): system, user or assistant.
Said: TypeAlias = tuple[tuple[str, str], ...]

MOONCAKE_BLOCK_TOKENS = 512
_MOST_TOKENS = 1 << 24  # that a row may ask for: more is a mistake
_ROLES = ("system", "user", "assistant")
_ROW_KEYS = ("prompt", "messages", "output_tokens", "at_s", "session", "think_s")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is said before an answer; how long the answer is to be, or which one was recorded, where the file tells."""

    said: Said
    output_tokens: int | None = None
    recorded: str | None = None
    think_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    rows: list[Row]
    at_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    dialogues: list[Dialogue]  # in order of their times, where they have them
    left_out: int = 0

    @property
    def timed(self) -> bool:
        return bool(self.dialogues) and self.dialogues[0].at_s is not None


class Request(NamedTuple):
    """A line of a trace. `blocks`: ids of the blocks of 512 tokens that its prompt is made of, where they are known."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class Trace:
    """A trace in columns, as one may have millions of lines."""

    at_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    output_tokens: array[int] = field(default_factory=lambda: array("q"))
    blocks: array[int] = field(default_factory=lambda: array("q"))
    block_ends: array[int] = field(default_factory=lambda: array("q"))
    left_out: int = 0  # lines without an answer: requests that had failed
    sorted: bool = True

    def __len__(self) -> int:
        return len(self.at_s)

    def add(self, request: Request) -> None:
        if request.output_tokens == 0 or request.prompt_tokens == 0:
            self.left_out += 1
            return
        self.sorted = self.sorted and (not self.at_s or request.at_s >= self.at_s[-1])
        self.at_s.append(request.at_s)
        self.prompt_tokens.append(request.prompt_tokens)
        self.output_tokens.append(request.output_tokens)
        self.blocks.extend(request.blocks)
        self.block_ends.append(len(self.blocks))

    def in_order(self) -> Iterator[Request]:
        """By time, the first at 0."""
        order: Sequence[int] = range(len(self))
        if not self.sorted:
            order = sorted(order, key=self.at_s.__getitem__)
        for i in order:
            blocks = self.blocks[self.block_ends[i - 1] if i else 0 : self.block_ends[i]]
            at_s = self.at_s[i] - self.at_s[order[0]]
            yield Request(at_s, self.prompt_tokens[i], self.output_tokens[i], tuple(blocks))


def read(file: Path) -> Texts | Trace:
    """Everything in `file`, checked; what does not fit is a LlmoptError with its line."""
    try:
        found = _READERS[file.suffix](file)
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        message = f"{file.name} is not UTF-8: {error.reason} at byte {error.start}"
        raise LlmoptError(message, hint="save it as plain UTF-8 text") from None
    except csv.Error as error:
        raise LlmoptError(f"{file.name} is not CSV: {error}", hint="is it a trace, and unpacked?") from None
    if not (len(found) if isinstance(found, Trace) else found.dialogues):
        raise LlmoptError(f"{file.name} has no request in it", hint="check that it is the right file")
    return found


def _read_json_lines(file: Path) -> Texts | Trace:
    """Rows with texts, or a Mooncake trace: the first row tells."""
    trace = Trace()
    rows: list[tuple[str, Mapping[str, Any]]] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file.name}:{number}"
            values = _object(line, place)
            if len(trace) + trace.left_out or (not rows and "input_length" in values):
                trace.add(_mooncake(values, place))
            else:
                rows.append((place, values))
    return _dialogues(rows) if rows else trace


def _mooncake(values: Mapping[str, Any], place: str) -> Request:
    at_ms = _number(values, "timestamp", place)
    prompt_tokens = _whole(values, "input_length", place)
    blocks = values.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(b, int) and 0 <= b < 1 << 63 for b in blocks):
        raise LlmoptError(f"{place}: `hash_ids` is not a list of whole numbers", hint="see the Mooncake traces")
    if blocks and len(blocks) != -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS):
        message = f"{place}: {len(blocks)} `hash_ids` are not those of {prompt_tokens} tokens"
        raise LlmoptError(message, hint=f"there is one for each block of {MOONCAKE_BLOCK_TOKENS} tokens begun")
    return Request(at_ms / 1e3, prompt_tokens, _whole(values, "output_length", place), tuple(blocks))


def _dialogues(rows: list[tuple[str, Mapping[str, Any]]]) -> Texts:
    sessions: dict[str, Dialogue] = {}
    dialogues: list[Dialogue] = []
    for place, values in rows:
        row = _row(values, place)
        at_s = _number(values, "at_s", place) if values.get("at_s") is not None else None
        session = values.get("session")
        known = None if session is None else sessions.get(str(session))
        if known is not None:
            if at_s is not None:
                message = f"{place}: only the first row of session `{session}` may have an `at_s`"
                raise LlmoptError(message, hint="later turns follow the answer before them, after `think_s`")
            known.rows.append(row)
            continue
        dialogues.append(Dialogue(rows=[row], at_s=at_s))
        if session is not None:
            sessions[str(session)] = dialogues[-1]
        if (at_s is None) != (dialogues[0].at_s is None):
            raise LlmoptError(f"{place}: some rows have an `at_s` and some have none", hint="give it to all or to none")
    if dialogues[0].at_s is not None:
        dialogues.sort(key=lambda dialogue: dialogue.at_s or 0.0)
    return Texts(dialogues=dialogues)


def _row(values: Mapping[str, Any], place: str) -> Row:
    for key in values:
        if key not in _ROW_KEYS:
            raise LlmoptError(f"{place}: a row has no `{key}`", hint=nearest(key, _ROW_KEYS))
    if ("prompt" in values) == ("messages" in values):
        raise LlmoptError(f"{place}: a row needs either a `prompt` or `messages`", hint='write {"prompt": "..."}')
    said = _messages(values["messages"], place) if "messages" in values else (("user", values["prompt"]),)
    if not all(isinstance(text, str) and text for _, text in said):
        raise LlmoptError(f"{place}: a prompt must be text that is not empty", hint="images and tools cannot be sent")
    return Row(
        said=said,
        output_tokens=_whole(values, "output_tokens", place, least=1) if "output_tokens" in values else None,
        think_s=_number(values, "think_s", place) if "think_s" in values else None,
    )


def _messages(values: Any, place: str) -> Said:
    fits = isinstance(values, list) and all(isinstance(m, dict) and m.get("role") in _ROLES for m in values)
    if not fits or not values or values[-1]["role"] != "user":
        message = f"{place}: `messages` must be a list of messages with a `role` and `content`, the last one the user's"
        raise LlmoptError(message, hint="roles: `system`, `user`, `assistant`")
    return tuple((message["role"], message.get("content")) for message in values)


def _read_sharegpt(file: Path) -> Texts:
    """Conversations between a person and a model. Those that the model begins, or that have no answer, are left out."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _no_json(file.name, error) from None
    hint = 'ShareGPT is a list of {"conversations": [{"from": "human", "value": "..."}, ...]}'
    if not isinstance(values, list):
        raise LlmoptError(f"{file.name}: not a list of conversations", hint=hint)
    dialogues = []
    for number, value in enumerate(values):
        turns = value.get("conversations", value.get("conversation")) if isinstance(value, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise LlmoptError(f"{file.name}: item {number} has no `conversations`", hint=hint)
        if rows := _answered(turns):
            dialogues.append(Dialogue(rows=rows))
    return Texts(dialogues=dialogues, left_out=len(values) - len(dialogues))


def _answered(turns: list[Mapping[str, Any]]) -> list[Row]:
    """The turns of a ShareGPT conversation until one that is not a question with its answer."""
    said: list[tuple[str, str]] = []
    rows: list[Row] = []
    for turn in turns:
        role, text = _SHAREGPT_ROLES.get(turn.get("from", "")), turn.get("value")
        if role is None or not isinstance(text, str) or not text.strip():
            break
        asked = bool(said) and said[-1][0] == "user"
        if asked != (role == "assistant") or (role == "system" and rows):
            break
        if role == "assistant":
            rows.append(Row(said=tuple(said), recorded=text))
            said = []
        else:
            said.append((role, text))
    return rows


def _read_csv(file: Path) -> Trace:
    trace = Trace()
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines)
        names = next(table, [])
        dialect = next((d for d in _DIALECTS if set(d.columns) <= set(names)), None)
        if dialect is None:
            known = " or ".join(", ".join(f"`{column}`" for column in d.columns) for d in _DIALECTS)
            raise LlmoptError(f"{file.name}:1: these are not the columns of a trace", hint=f"there should be {known}")
        at, prompt, output = map(names.index, dialect.columns)
        for row in table:
            if not row:
                continue
            try:
                request = Request(dialect.seconds(row[at]), int(row[prompt]), int(row[output]))
            except (IndexError, ValueError):
                message = f"{file.name}:{table.line_num}: not a time and two numbers of tokens: `{','.join(row)}`"
                raise LlmoptError(message, hint="correct the row, or leave it out") from None
            if not (0 <= request.at_s < math.inf and min(request[1:3]) >= 0 and max(request[1:3]) < _MOST_TOKENS):
                message = f"{file.name}:{table.line_num}: a time or a number of tokens cannot be: `{','.join(row)}`"
                raise LlmoptError(message, hint="check the row")
            trace.add(request)
    return trace


class _Dialect(NamedTuple):
    columns: tuple[str, str, str]  # time, prompt tokens, output tokens
    seconds: Callable[[str], float]


def _seconds_of_date(text: str) -> float:
    """Azure's stamps have seven digits behind the point, Python reads six."""
    whole, _, rest = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{rest[:7].rstrip('Z') or 0}")


_DIALECTS = (
    _Dialect(("Timestamp", "Request tokens", "Response tokens"), float),
    _Dialect(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _seconds_of_date),
)
_READERS: Mapping[str, Callable[[Path], Texts | Trace]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_sharegpt,
    ".csv": _read_csv,
}


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _no_json(place, error) from None
    if not isinstance(values, dict):
        raise LlmoptError(f"{place}: a row is a JSON object", hint='write {"prompt": "..."}')
    return values


def _no_json(place: str, error: ValueError) -> LlmoptError:
    hint = "a row is one JSON object on one line" if ":" in place else f"it should be JSON: {place}"
    return LlmoptError(f"{place}: not JSON: {error}", hint=hint)


def _number(values: Mapping[str, Any], name: str, place: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise LlmoptError(f"{place}: `{name}` must be a number from 0, not `{value}`", hint="check the row")
    return float(value)


def _whole(values: Mapping[str, Any], name: str, place: str, *, least: int = 0) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MOST_TOKENS:
        message = f"{place}: `{name}` must be a whole number from {least}, not `{value}`"
        raise LlmoptError(message, hint="check the row")
    return value
