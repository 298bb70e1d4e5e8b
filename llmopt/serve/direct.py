"""The engine without HTTP: `python -m llmopt.serve.direct ENGINE`, for measuring what the server adds to it.

Lines of JSON on stdin: `{"id": 1, "body": {...}}` with the body of a completions or chat request, or `{"cancel": 1}`.
Lines on stdout: `{"ready": true}` or `{"fatal": message}`; `{"id": 1, "prompt_tokens": 128}` when a request has been
taken; and after each step of the engine `{"at_ns": stamp, "events": [[id, tokens, finish, error], ...]}`, the stamp by
the monotonic clock, which all processes of a machine share, and `tokens` a count. It ends when its stdin does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import sys
import time
from pathlib import Path
from typing import IO, Any

from llmopt.errors import LlmoptError
from llmopt.models.chat import ChatTemplate, TemplateRefusedError
from llmopt.serve import MAX_BATCH, worker
from llmopt.serve.folder import BLOCK_TOKENS, EngineFolder, available_bytes
from llmopt.serve.protocol import ApiError, parse


class Requests:
    """Turns the body of a request into what the worker takes."""

    def __init__(self, folder: EngineFolder, max_context_tokens: int) -> None:
        from tokenizers import Tokenizer

        self._max_context_tokens = max_context_tokens
        self._tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = ChatTemplate.read(folder.path)

    def prepare(self, id_: int, body: Any) -> dict[str, Any]:
        """Raises ApiError for what the server would refuse too."""
        chat = isinstance(body, dict) and "messages" in body
        model = body.get("model") if isinstance(body, dict) else None
        call = parse(json.dumps(body).encode(), chat=chat, model_name=str(model))
        if chat:
            tokens = self._encode(self._render(call.messages, call.template_variables), special=False)
        else:
            prompt = call.prompts[0]
            tokens = self._encode(prompt, special=True) if isinstance(prompt, str) else prompt
        sampling = call.sampling
        max_tokens = sampling.max_tokens or max(1, self._max_context_tokens - len(tokens))
        if not tokens or len(tokens) + max_tokens > self._max_context_tokens:
            raise ApiError(
                400, f"{len(tokens)} tokens and {max_tokens} more: the context is {self._max_context_tokens}"
            )
        return {**dataclasses.asdict(sampling), "add": id_, "tokens": tokens, "max_tokens": max_tokens}

    def _render(self, messages: Any, variables: Any) -> str:
        if self._template is None:
            raise ApiError(400, "this model has no chat template")
        try:
            return self._template.render(messages, variables)
        except TemplateRefusedError as error:
            raise ApiError(400, f"the chat template refuses the messages: {error}") from None

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)


class _Inbox:
    """Lines from a pipe: `read(block)` gives those that are there, None at its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._partial = b""

    def read(self, *, block: bool) -> list[Any] | None:
        lines: list[bytes] = []
        while select.select([self._descriptor], [], [], None if block and not lines else 0)[0]:
            data = os.read(self._descriptor, 1 << 20)
            if not data:
                return None
            *whole, self._partial = (self._partial + data).split(b"\n")
            lines += whole
        return [json.loads(line) for line in lines if line]


def run(engine: worker.Worker, requests: Requests, descriptor: int, out: IO[bytes]) -> None:
    """Until the pipe ends."""
    inbox = _Inbox(descriptor)
    while (messages := inbox.read(block=not engine.busy)) is not None:
        for message in messages:
            if "cancel" in message:
                engine.cancel(message["cancel"])
                continue
            try:
                request = requests.prepare(message["id"], message["body"])
            except ApiError as error:
                _send(out, {"at_ns": time.monotonic_ns(), "events": [[message["id"], 0, None, str(error)]]})
                continue
            engine.add(request)
            _send(out, {"id": message["id"], "prompt_tokens": len(request["tokens"])})
        events = engine.step()
        if events:
            at_ns = time.monotonic_ns()
            _send(out, {"at_ns": at_ns, "events": [[id_, len(ids), end, why] for id_, ids, end, why in events]})


def main(engine: Path) -> int:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the runtime prints belongs in the log
    try:
        folder = EngineFolder.read(engine)
        blocks = folder.kv_blocks(MAX_BATCH, available_bytes())
        requests = Requests(folder, min(folder.max_context_tokens, (blocks - 1) * BLOCK_TOKENS))
        started = worker.start(folder.configuration(blocks, MAX_BATCH))
    except (LlmoptError, RuntimeError) as error:
        _send(out, {"fatal": next(iter(str(error).splitlines()), type(error).__name__)})
        return 1
    _send(out, {"ready": True})
    try:
        run(started, requests, 0, out)
    except BrokenPipeError:
        return 0  # whoever measured has gone
    return 0


def _send(out: IO[bytes], message: Any) -> None:
    out.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
