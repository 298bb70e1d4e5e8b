"""OpenAI's request bodies, checked: what comes out can be given to the engine, everything else is a 4xx."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Parameters that would change the answer and are not supported, with the values that ask for nothing.
#: None is always one; parameters not named anywhere here are ignored.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "prompt_logprobs": (),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

MAX_PROMPTS = 256
_SMALLEST = 1e-5  # of temperature and top_p; below it the likeliest token is all that is left, and f32 overflows
_LARGEST = (1 << 31) - 1


class ApiError(Exception):
    """An error reply in OpenAI's shape. `param` and `code` are for programs, `message` for people."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the engine is to choose tokens. `max_tokens` None: as many as the context holds."""

    max_tokens: int | None
    min_tokens: int
    temperature: float  # 0: the likeliest token always
    top_p: float
    top_k: int  # 0: no limit
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request. Prompts are text or token ids; a chat has one, its messages are rendered elsewhere."""

    prompts: tuple[str | list[int], ...]
    messages: tuple[dict[str, str], ...]
    template_variables: Mapping[str, Any]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: bytes, *, chat: bool, model_name: str) -> Call:
    """Raises ApiError for anything that cannot be served as asked."""
    fields = _Fields(_json_object(body))
    model = fields.text("model")
    if model is not None and model != model_name:
        message = f"the model `{model}` does not exist; this server has `{model_name}`"
        raise ApiError(404, message, param="model", code="model_not_found")
    for name, harmless in UNSUPPORTED.items():
        fields.refuse(name, harmless)
    stream = fields.flag("stream")
    options = fields.mapping("stream_options")
    if options and not stream:
        raise ApiError(400, "`stream_options` needs `stream: true`", param="stream_options")
    return Call(
        prompts=() if chat else _prompts(fields.values.get("prompt")),
        messages=_messages(fields.values.get("messages")) if chat else (),
        template_variables=fields.mapping("chat_template_kwargs") if chat else {},
        sampling=_sampling(fields),
        stop=_stop(fields.values.get("stop")),
        stream=stream,
        include_usage=_Fields(options).flag("include_usage"),
    )


def _sampling(fields: _Fields) -> Sampling:
    limit = "max_completion_tokens" if fields.values.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = fields.whole(limit, None, low=1)
    min_tokens = fields.whole("min_tokens", 0, low=0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(400, f"`min_tokens` is more than `{limit}`", param="min_tokens")
    top_p = fields.number("top_p", 1.0, low=0.0, high=1.0)
    if top_p == 0.0:
        raise ApiError(400, "`top_p` must be more than 0", param="top_p")
    temperature = fields.number("temperature", 1.0, low=0.0, high=2.0)
    seed = fields.whole("seed", None)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature if temperature > _SMALLEST else 0.0,
        top_p=max(top_p, _SMALLEST),
        top_k=min(max(fields.whole("top_k", 0, low=-1), 0), _LARGEST),
        seed=secrets.randbits(32) if seed is None else seed % (1 << 63),
        ignore_eos=fields.flag("ignore_eos"),
    )


class _Fields:
    """The members of a JSON object by name and type; null is as good as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def refuse(self, name: str, harmless: tuple[Any, ...]) -> None:
        value = self.values.get(name)
        if value is None or any(type(value) is type(known) and value == known for known in harmless):
            return
        raise ApiError(400, f"`{name}` is not supported by this server", param=name, code="unsupported_parameter")

    def text(self, name: str) -> str | None:
        value: str | None = self._typed(name, str, "a string")
        return value

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self._typed(name, dict, "an object") or {}

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        value = self._typed(name, (int, float), "a number")
        if value is None:
            return default
        if not low <= value <= high:
            raise ApiError(400, f"`{name}` must be from {low:g} to {high:g}, not {value}", param=name)
        return float(value)

    def whole(self, name: str, default: Any, *, low: float = -math.inf) -> Any:
        value = self._typed(name, int, "a whole number")
        if value is None:
            return default
        if value < low:
            raise ApiError(400, f"`{name}` must be at least {low:g}, not {value}", param=name)
        return value

    def _typed(self, name: str, kind: Any, words: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"`{name}` must be {words}", param=name)
        return value


def _json_object(body: bytes) -> Mapping[str, Any]:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        values = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _prompts(prompt: Any) -> tuple[str | list[int], ...]:
    """A text, a list of token ids, or a list of either."""
    if isinstance(prompt, str) or _is_tokens(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not all(isinstance(p, str) or _is_tokens(p) for p in prompt):
        raise ApiError(400, "`prompt` must be a string, a list of token ids, or a list of these", param="prompt")
    if not prompt:
        raise ApiError(400, "`prompt` is empty", param="prompt")
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(400, f"`prompt` holds {len(prompt)} prompts; {MAX_PROMPTS} are the most", param="prompt")
    return tuple(encodable(p, "prompt") if isinstance(p, str) else p for p in prompt)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list):
        raise ApiError(400, "`messages` must be a list", param="messages")
    if not messages:
        raise ApiError(400, "`messages` is empty", param="messages")
    return tuple(_message(message, f"messages.{i}") for i, message in enumerate(messages))


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"`{where}` must be an object with a `role`", param=where)
    if message.get("tool_calls") or message["role"] in ("tool", "function"):
        raise ApiError(400, "tools are not supported by this server", param=where, code="unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}.content") for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"`{where}.content` must be a string or a list of text parts", param=f"{where}.content")
    return {"role": encodable(message["role"], where), "content": encodable(content, f"{where}.content")}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ApiError(400, f"`{where}` must hold text parts only", param=where)


def _stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, "`stop` must be a string or a list of strings, none of them empty", param="stop")
    return tuple(stops)


def encodable(text: str, where: str) -> str:
    """The same text. JSON can spell half of a surrogate pair, which no tokenizer takes; raises ApiError for one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"`{where}` is not valid Unicode: it holds a lone surrogate", param=where) from None
    return text
