"""The endpoints that bench can load: what is sent, and where the answer has its text. One row each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """`text` reads a choice of one streamed event, `whole` a choice of an answer that was not streamed."""

    path: str
    prompt: Callable[[str], dict[str, Any]]
    text: Callable[[Mapping[str, Any]], str]
    whole: Callable[[Mapping[str, Any]], str]
    templated: bool = False  # the server puts a chat template around the prompt, so it counts more tokens


def _delta_text(choice: Mapping[str, Any]) -> str:
    """Reasoning is output too: a client waits for it, and the server counts it."""
    return _spoken(choice.get("delta") or {})


def _message_text(choice: Mapping[str, Any]) -> str:
    return _spoken(choice.get("message") or {})


def _spoken(part: Mapping[str, Any]) -> str:
    text = part.get("content") or part.get("reasoning_content") or part.get("reasoning") or ""
    return str(text)


def _plain_text(choice: Mapping[str, Any]) -> str:
    return str(choice.get("text") or "")


ENDPOINTS: Mapping[str, Endpoint] = {
    "completions": Endpoint(
        path="/v1/completions", prompt=lambda text: {"prompt": text}, text=_plain_text, whole=_plain_text
    ),
    "chat": Endpoint(
        path="/v1/chat/completions",
        prompt=lambda text: {"messages": [{"role": "user", "content": text}]},
        text=_delta_text,
        whole=_message_text,
        templated=True,
    ),
}


def body(endpoint: Endpoint, *, model: str, prompt: str, output_tokens: int) -> bytes:
    """The request's JSON: greedy, exactly `output_tokens` long where the server honours `ignore_eos`, with usage."""
    fields: dict[str, Any] = {
        "model": model,
        **endpoint.prompt(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields, ensure_ascii=False).encode()
