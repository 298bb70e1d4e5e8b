"""The endpoints that bench can load: what is sent where, and how what comes back is read. One row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

import orjson

from llmopt.bench import answers
from llmopt.bench.answers import Answer, Take
from llmopt.bench.client.wire import Response

#: Role (system, user, assistant) and text of each turn of a conversation so far.
Turns: TypeAlias = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """One way to ask for text. Requests are greedy and ask for a stream, with usage where that has to be asked for."""

    name: str
    route: str  # with `{model}` where it is in the path
    fields: Callable[[Turns, int], dict[str, Any]]  # of the body, without the model
    take: Take
    templated: bool = False  # the server puts a chat template around the prompt, so it counts more tokens
    names_model: bool = True  # in the body
    says_end: bool = True  # its streams say when they are complete

    def path_for(self, model: str) -> str:
        return self.route.replace("{model}", quote(model, safe=""))

    def body(self, *, model: str, turns: Turns, output_tokens: int) -> bytes:
        """The request's JSON. It asks for exactly `output_tokens`, where the server can be told not to stop early.

        Endpoints without a template get the texts of all turns as one.
        """
        fields = self.fields(turns, output_tokens)
        return orjson.dumps({"model": model, **fields} if self.names_model else fields)

    def read(self, response: Response) -> Answer:
        """Never raises: an answer that is not of this endpoint has a failure."""
        return answers.read(response, self.take, says_end=self.says_end)

    def answer(self, response: Response) -> str:
        """The text of an answer, without its reasoning, for the next turn of a conversation."""
        return "".join(self.read(response).texts)


def _joined(turns: Turns) -> str:
    return "".join(text for _, text in turns)


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _openai(output_tokens: int) -> dict[str, Any]:
    return {
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _completions(turns: Turns, output_tokens: int) -> dict[str, Any]:
    return {"prompt": _joined(turns), **_openai(output_tokens)}


def _chat(turns: Turns, output_tokens: int) -> dict[str, Any]:
    return {"messages": _messages(turns), **_openai(output_tokens)}


def _responses(turns: Turns, output_tokens: int) -> dict[str, Any]:
    return {
        "input": _messages(turns),
        "max_output_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "store": False,
    }


def _triton(turns: Turns, output_tokens: int) -> dict[str, Any]:
    """vLLM knows `ignore_eos`, TensorRT-LLM `min_tokens`; what is no input of a model is a parameter of its backend."""
    return {
        "text_input": _joined(turns),
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def _sagemaker(turns: Turns, output_tokens: int) -> dict[str, Any]:
    parameters = {"max_new_tokens": output_tokens, "do_sample": False, "ignore_eos_token": True, "details": True}
    return {"inputs": _joined(turns), "parameters": parameters, "stream": True}


def _tgi(turns: Turns, output_tokens: int) -> dict[str, Any]:
    """It has no way to ask for more than the model wants to say."""
    return {
        "inputs": _joined(turns),
        "parameters": {"max_new_tokens": output_tokens, "do_sample": False, "details": True},
    }


ENDPOINTS: Mapping[str, Endpoint] = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint(name="completions", route="/v1/completions", fields=_completions, take=answers.take_completion),
        Endpoint(name="chat", route="/v1/chat/completions", fields=_chat, take=answers.take_chat, templated=True),
        Endpoint(
            name="responses", route="/v1/responses", fields=_responses, take=answers.take_response, templated=True
        ),
        Endpoint(
            name="triton",
            route="/v2/models/{model}/generate_stream",
            fields=_triton,
            take=answers.take_triton,
            names_model=False,
            says_end=False,
        ),
        Endpoint(
            name="sagemaker",
            route="/invocations",
            fields=_sagemaker,
            take=answers.take_sagemaker,
            names_model=False,
            says_end=False,
        ),
        Endpoint(name="tgi", route="/generate_stream", fields=_tgi, take=answers.take_tgi, names_model=False),
    )
}
