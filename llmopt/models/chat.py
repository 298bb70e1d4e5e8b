"""The chat template of a checkpoint: messages in, prompt out, as transformers renders it.

Templates come with downloaded models, so they are somebody else's code: they run in jinja2's sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.models.companions import read_json


class TemplateRefusedError(Exception):
    """The template does not accept these messages (a role out of order, say); the text is the template's own."""


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template as text, with the special tokens that it may name."""

    text: str
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> TemplateSource | None:
        """From chat_template.jinja or else tokenizer_config.json; None for a model without one. Loads no jinja2."""
        config = read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            return None
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
        return cls(source, {name: text for name, text in tokens.items() if text is not None})


class ChatTemplate:
    """A compiled template. `today` is the day that it believes it is, by default the real one."""

    def __init__(self, source: TemplateSource, *, today: datetime.datetime | None = None) -> None:
        from jinja2 import TemplateError

        try:
            self._template = _environment(today).from_string(source.text)
        except TemplateError as error:
            raise LlmoptError(f"the chat template cannot be read: {error}") from None
        self._special_tokens = source.special_tokens

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """That of a model's or an engine's folder; None without one."""
        source = TemplateSource.read(folder)
        return None if source is None else cls(source)

    def render(
        self, messages: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], *, generation_prompt: bool = True
    ) -> str:
        """The messages as text, up to where the assistant's answer begins unless `generation_prompt` is false.

        `extra` are variables that the template may read.
        """
        from jinja2 import TemplateError

        ours = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return str(self._template.render({**self._special_tokens, **extra, **ours}))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateRefusedError(str(error)) from None


def _environment(today: datetime.datetime | None) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what is trained on; in a prompt it means nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    strftime: Callable[[str], str] = lambda format_: (today or datetime.datetime.now()).strftime(format_)  # noqa: E731
    environment.globals["strftime_now"] = strftime
    return environment


def _to_json(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json is a string, or an object with its settings."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None
