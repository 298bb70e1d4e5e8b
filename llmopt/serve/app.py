"""The OpenAI-compatible routes over an engine process.

A request's life: parse (protocol.py), render and tokenize, submit every prompt, then turn the tokens that come back
into text until each choice has ended. Leaving that loop for any reason, the client's disappearance included, frees
what is still running.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from llmopt.models.chat import ChatTemplate, TemplateRefusedError
from llmopt.serve.engine import Engine, Events, Tokens
from llmopt.serve.protocol import ApiError, Call, encodable, parse
from llmopt.serve.text import Detokenizer, StopStrings, Vocabulary

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from tokenizers import Tokenizer

MAX_BODY_BYTES = 8 << 20
_LONG_TEXT = 4096  # characters; a longer prompt is tokenized beside the event loop


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What the routes serve."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    template: ChatTemplate | None
    vocab_size: int
    created: int  # seconds since 1970


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of one choice. `tokens` counts all of the choice so far; `finish` marks the last piece."""

    index: int
    text: str
    tokens: int
    finish: str | None


def build(model: Model) -> Starlette:
    """The ASGI application."""

    async def completions(request: Request) -> Response:
        return await _answer(model, request, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await _answer(model, request, chat=True)

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model_card(model)]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != model.name:
            raise ApiError(404, f"the model `{name}` does not exist", param="model", code="model_not_found")
        return _json(_model_card(model))

    async def health(request: Request) -> Response:
        if model.engine.failure:
            return _json({"status": model.engine.failure}, 503)
        return _json({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
    )


async def _answer(model: Model, request: Request, *, chat: bool) -> Response:
    call = parse(await _body(request), chat=chat, model_name=model.name)
    if model.engine.failure:
        raise ApiError(503, model.engine.failure)
    prompts = await _tokenize(model, call)
    limits = [_limit(model, prompt, call) for prompt in prompts]
    writer = _Writer(model.name, chat=chat, prompt_tokens=sum(map(len, prompts)), choices=len(prompts))
    pieces = _generate(model, call, prompts, limits, request)
    if not call.stream:
        return await _whole(pieces, writer)
    # The first piece decides the status: a request that fails before it is a plain error, not a broken stream.
    first = await anext(pieces, None)
    return Response(status_code=499) if first is None else _Stream(first, pieces, writer, call.include_usage)


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    return bytes(body)


async def _tokenize(model: Model, call: Call) -> list[list[int]]:
    """Token ids of each prompt. A plain prompt gets the usual special tokens; a chat template writes its own."""
    if not call.messages:
        prompts = [await _encode(model, p, True) if isinstance(p, str) else p for p in call.prompts]
    elif model.template is None:
        raise ApiError(400, "this model has no chat template; use `/v1/completions`", code="no_chat_template")
    else:
        try:
            text = model.template.render(call.messages, call.template_variables)
        except TemplateRefusedError as error:
            raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from None
        prompts = [await _encode(model, encodable(text, "messages"), False)]
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "`prompt` is empty", param="prompt")
        if not all(0 <= token < model.vocab_size for token in prompt):
            raise ApiError(400, f"`prompt` holds token ids outside 0 to {model.vocab_size - 1}", param="prompt")
    return prompts


async def _encode(model: Model, text: str, special: bool) -> list[int]:
    if len(text) < _LONG_TEXT:
        return list(model.tokenizer.encode(text, add_special_tokens=special).ids)
    encoding = await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens=special)
    return list(encoding.ids)


def _limit(model: Model, prompt: Sequence[int], call: Call) -> int:
    """Tokens to generate at most: what was asked for, or what the context has left."""
    context, asked = model.engine.max_context_tokens, call.sampling.max_tokens
    wanted = asked or max(call.sampling.min_tokens, 1)
    if len(prompt) + wanted > context:
        message = f"the context of this model is {context} tokens; the prompt has {len(prompt)}"
        message += f" and {wanted} were asked for"
        param = "messages" if call.messages else "prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return asked or context - len(prompt)


async def _generate(
    model: Model, call: Call, prompts: Sequence[Sequence[int]], limits: Sequence[int], request: Request
) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come; ends early if the client goes. Raises ApiError if the engine fails."""
    events: Events = asyncio.Queue()
    choices = [_Choice(i, model.vocabulary, call.stop) for i in range(len(prompts))]
    ids = [
        model.engine.submit(prompt, limit, call.sampling, i, events)
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    watch = asyncio.create_task(_watch(request.receive, events))
    try:
        running = len(choices)
        while running and (event := await events.get()) is not None:
            if event.error:
                raise ApiError(500, event.error)
            choice = choices[event.index]
            if choice.finished:  # by a stop string, while the engine was a step ahead
                continue
            piece = choice.take(event)
            if piece.finish:
                running -= 1
                model.engine.cancel(ids[event.index])
            if piece.text or piece.finish:
                yield piece
    finally:
        watch.cancel()
        for id_ in ids:
            model.engine.cancel(id_)


async def _watch(receive: Receive, events: Events) -> None:
    """Put None into `events` when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


class _Choice:
    """One prompt's completion: tokens in, text out."""

    def __init__(self, index: int, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self.finished = False
        self._index = index
        self._detokenizer = Detokenizer(vocabulary)
        self._stops = StopStrings(stops)
        self._count = 0

    def take(self, event: Tokens) -> Piece:
        """The text that these tokens bring. Tokens after a stop string are as if never generated."""
        text, finish = "", event.finish
        for i, token in enumerate(event.tokens, 1):
            self._count += 1
            if event.finish == "stop" and i == len(event.tokens):
                break  # the end-of-sequence token, which not every tokenizer marks as special
            shown, stopped = self._stops.push(self._detokenizer.push(token))
            text += shown
            if stopped:
                return self._end(text, "stop")
        if not finish:
            return Piece(self._index, text, self._count, None)
        shown, stopped = self._stops.push(self._detokenizer.finish())
        return self._end(text + shown + self._stops.finish(), "stop" if stopped else finish)

    def _end(self, text: str, finish: str) -> Piece:
        self.finished = True
        return Piece(self._index, text, self._count, finish)


class _Writer:
    """Answers of one request in OpenAI's JSON. Of a chunk only the text is encoded anew."""

    def __init__(self, model_name: str, *, chat: bool, prompt_tokens: int, choices: int) -> None:
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self.choices = choices
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def chunks(self, include_usage: bool) -> _Chunks:
        head = self._head | ({"object": "chat.completion.chunk"} if self._chat else {})
        return _Chunks(head, chat=self._chat, include_usage=include_usage)

    def whole(self, texts: Sequence[str], finishes: Sequence[str], tokens: Sequence[int]) -> dict[str, Any]:
        choices = [
            {"index": i, **self._content(text), "logprobs": None, "finish_reason": finish}
            for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self.usage(sum(tokens))}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}


class _Chunks:
    """Server-sent events of one request."""

    def __init__(self, head: Mapping[str, Any], *, chat: bool, include_usage: bool) -> None:
        self._head = head
        self._open = b"data: " + _dump(head)[:-1] + b',"choices":[{"index":'
        self._close = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._chat = chat
        self._begun: set[int] = set()

    def piece(self, piece: Piece) -> bytes:
        text = json.dumps(piece.text).encode()
        if not self._chat:
            text = b'"text":' + text
        elif piece.index in self._begun:
            text = b'"delta":{"content":' + text + b"}"
        else:
            self._begun.add(piece.index)
            text = b'"delta":{"role":"assistant","content":' + text + b"}"
        finish = b'"%s"' % piece.finish.encode() if piece.finish else b"null"
        ending = b',"logprobs":null,"finish_reason":' + finish + b"}]" + self._close
        return b"%b%d,%b%b" % (self._open, piece.index, text, ending)

    def usage(self, usage: Mapping[str, int]) -> bytes:
        return b"data: " + _dump({**self._head, "choices": [], "usage": usage}) + b"\n\n"


class _Stream(Response):
    """Server-sent events, sent as plain ASGI messages: one for each piece of text."""

    def __init__(self, first: Piece, rest: AsyncGenerator[Piece, None], writer: _Writer, include_usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._writer = writer
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        chunks = self._writer.chunks(self._include_usage)
        counts = [0] * self._writer.choices
        finished = 0

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(_prepend(self._first, self._rest)) as pieces:
                async for piece in pieces:
                    counts[piece.index] = piece.tokens
                    finished += piece.finish is not None
                    await put(chunks.piece(piece))
        except ApiError as error:
            await put(b"data: " + _dump(error.body()) + b"\n\n", False)
            return
        tail = chunks.usage(self._writer.usage(sum(counts))) if self._include_usage else b""
        await put(tail + b"data: [DONE]\n\n" if finished == len(counts) else b"", False)


async def _prepend(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _whole(pieces: AsyncGenerator[Piece, None], writer: _Writer) -> Response:
    texts = [""] * writer.choices
    finishes = [""] * writer.choices
    counts = [0] * writer.choices
    async with aclosing(pieces):
        async for piece in pieces:
            texts[piece.index] += piece.text
            finishes[piece.index] = piece.finish or ""
            counts[piece.index] = piece.tokens
    return _json(writer.whole(texts, finishes, counts))


def _model_card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmopt",
        "max_model_len": model.engine.max_context_tokens,
    }


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body(), error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, which starlette answers in plain text."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json(ApiError(error.status_code, message).body(), error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    """starlette raises it again after this reply, so the log has the traceback."""
    return _json(ApiError(500, "internal error; see the server's log").body(), 500)


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dump(value), status, headers, media_type="application/json")


def _dump(value: Mapping[str, Any]) -> bytes:
    """ASCII, so that no text of a client's can fail to encode."""
    return json.dumps(value, separators=(",", ":")).encode()
