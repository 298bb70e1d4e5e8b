"""Java's .properties files: read by the rules of `java.util.Properties.load`, written so that every reader agrees.

Source: the class's documentation (Java SE 17). djl-serving reads the same file by Java's rules and, when it partitions
a model, by splitting lines at the first `=` (serving/docker/partition/utils.py of 0.33): what is written here has no
escapes that the second would keep, and what would need one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from llmopt.errors import SettingsError

_SPACE = " \t\f"
_ESCAPES: Mapping[str, str] = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One property and the line that it begins on, counted from 1."""

    key: str
    value: str
    line: int


def parse(text: str, *, file: str) -> tuple[Entry, ...]:
    """The properties in order; a key given twice is a SettingsError, for Java would silently take the last.

    `file` is for messages. Raises SettingsError for a malformed `\\uxxxx` too, as Java does.
    """
    found: dict[str, Entry] = {}
    for number, line in _logical_lines(text):
        key, value = _split(line)
        place = f"{file}:{number}"
        entry = Entry(_unescape(key, place), _unescape(value, place), number)
        if entry.key in found:
            raise SettingsError(
                f"{place}: `{entry.key}` is given twice", hint=f"remove it here or on line {found[entry.key].line}"
            )
        found[entry.key] = entry
    return tuple(found.values())


def write(values: Mapping[str, str], *, comments: Iterable[str] = ()) -> str:
    """The text of a file: comments, then `key=value` lines in the order given.

    Raises SettingsError for a value that Java and a plain reader would not read alike.
    """
    for key, value in values.items():
        odd = "\\\n\r" + ("" if value.isascii() else value)
        if any(c in odd for c in value) or value != value.strip() or not key.isascii() or set(key) & set("=:\\# !\t\n"):
            raise SettingsError(
                f"`{key}` cannot be written as the property `{value}`",
                hint="plain ASCII, without backslashes, line breaks or blanks around it",
            )
    lines = [f"# {comment}" for comment in comments] + [f"{key}={value}" for key, value in values.items()]
    return "".join(f"{line}\n" for line in lines)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their continuations joined, without blank lines and comments, and the number each begins on.

    Only \\n, \\r and \\r\\n end a line, and a comment is never continued.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    start, joined = 0, ""
    for number, physical in enumerate(lines, start=1):
        line = physical.lstrip(_SPACE)
        if not joined:
            if not line or line[0] in "#!":
                continue
            start = number
        joined += line
        ended = (len(joined) - len(joined.rstrip("\\"))) % 2 == 0
        if ended or number == len(lines):
            yield start, joined if ended else joined[:-1]
            joined = ""
        else:
            joined = joined[:-1]


def _split(line: str) -> tuple[str, str]:
    """At the first `=`, `:` or blank that no backslash is before; blanks around the separator belong to neither."""
    end = 0
    while end < len(line) and line[end] not in "=:" + _SPACE:
        end += 2 if line[end] == "\\" else 1
    key, rest = line[:end], line[end:].lstrip(_SPACE)
    if rest[:1] in ("=", ":"):
        rest = rest[1:].lstrip(_SPACE)
    return key, rest


def _unescape(text: str, place: str) -> str:
    """Backslash escapes replaced; a backslash before any other character only goes."""
    if "\\" not in text:
        return text
    parts: list[str] = []
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character != "\\" or position == len(text):
            parts.append("" if character == "\\" else character)
            continue
        character = text[position]
        position += 1
        if character != "u":
            parts.append(_ESCAPES.get(character, character))
            continue
        digits = text[position : position + 4]
        if len(digits) < 4 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            raise SettingsError(f"{place}: malformed \\uxxxx encoding", hint="four hexadecimal digits follow `\\u`")
        parts.append(chr(int(digits, 16)))
        position += 4
    return "".join(parts)
