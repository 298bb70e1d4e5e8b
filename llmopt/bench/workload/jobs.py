"""Conversations as jobs of a plan: the first turn's bytes made beforehand, later ones when the answer is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmopt.bench.client.base import Exchange, Job, Target
from llmopt.bench.client.wire import Response
from llmopt.bench.workload.files import Said
from llmopt.bench.workload.source import Conversation


class Talk(Protocol):
    """What of an endpoint is needed here; picklable, as it goes along with later turns."""

    def body(self, *, model: str, turns: Sequence[tuple[str, str]], output_tokens: int) -> bytes: ...

    def answer(self, response: Response) -> str: ...


def jobs(
    conversations: Sequence[Conversation],
    *,
    endpoint: Talk,
    model: str,
    targets: Sequence[Target],
    arrivals_ns: Sequence[int] | None = None,
) -> list[Job]:
    """A job for the first turn of each conversation; the others follow from it.

    Targets take turns, and a conversation stays on its own, where its history may be in a cache. `arrivals_ns`: when
    each conversation begins (open loop).
    """
    found = []
    for i, conversation in enumerate(conversations):
        number = i % len(targets)
        first = _Turn(conversation, 0, conversation.turns[0].said, endpoint, model, targets[number], number)
        found.append(first.job(None if arrivals_ns is None else arrivals_ns[i]))
    return found


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn of a conversation, with everything `said` up to it; called when its answer has come, it makes the next."""

    conversation: Conversation
    index: int
    said: Said
    endpoint: Talk
    model: str
    target: Target
    target_number: int

    def job(self, due_ns: int | None) -> Job:
        turn = self.conversation.turns[self.index]
        body = self.endpoint.body(model=self.model, turns=self.said, output_tokens=turn.output_tokens)
        return Job(
            request=self.target.request(body),
            prompt=self.conversation.number,
            turn=self.index,
            target=self.target_number,
            due_ns=due_ns,
            wanted_tokens=turn.output_tokens,
            then=self if self.index + 1 < len(self.conversation.turns) else None,
        )

    def __call__(self, exchange: Exchange) -> Job | None:
        response = exchange.response
        if exchange.failure is not None or response is None or response.status != 200:
            return None
        following = self.conversation.turns[self.index + 1]
        said = (*self.said, ("assistant", self.endpoint.answer(response)), *following.said)
        turn = _Turn(
            self.conversation, self.index + 1, said, self.endpoint, self.model, self.target, self.target_number
        )
        return turn.job(exchange.end_ns + round(following.think_s * 1e9))
