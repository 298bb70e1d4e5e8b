"""The chat template of a checkpoint: messages in, prompt out, as transformers renders it.

Templates come with downloaded models, so they are somebody else's code: they run in jinja2's sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.serve.folder import read_json


class TemplateRefusedError(Exception):
    """The template does not accept these messages (a role out of order, say); the text is the template's own."""


class ChatTemplate:
    """The compiled template of an engine folder."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError

        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise LlmoptError(f"the chat template cannot be read: {error}") from None
        self._special_tokens = special_tokens

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """From chat_template.jinja or else tokenizer_config.json; None for a model without one."""
        config = read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            return None
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
        return cls(source, {name: text for name, text in tokens.items() if text is not None})

    def render(self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any]) -> str:
        """The prompt up to where the assistant's answer begins. `extra` are variables that the template may read."""
        from jinja2 import TemplateError

        ours = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return str(self._template.render({**self._special_tokens, **extra, **ours}))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise TemplateRefusedError(str(error)) from None


def _environment() -> Any:
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
    strftime: Callable[[str], str] = lambda format_: datetime.datetime.now().strftime(format_)  # noqa: E731
    environment.globals["strftime_now"] = strftime
    return environment


def _to_json(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json is a string, or an object with its settings."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None
