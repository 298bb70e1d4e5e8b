"""Conversations from a workload, as many as are asked for: made from held-out text, or from the rows of a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, cycle, islice
from pathlib import Path

from llmopt.bench.workload import files
from llmopt.bench.workload.files import MOONCAKE_BLOCK_TOKENS, Dialogue, Request, Row, Said, Texts, Trace
from llmopt.bench.workload.prompts import Cutter
from llmopt.bench.workload.spec import Length, Workload, draw_s, draw_tokens
from llmopt.errors import LlmoptError

_LEAST_DRAWN_TOKENS = 8  # of a prompt whose length is drawn: the special tokens must fit in
_SPARE_TOKENS = 16  # by which a prompt of a trace may be longer than there, where it cannot be as long
_BLOCKS_KEPT = 4096  # texts of blocks of a trace, the least used go first


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What is said before an answer, as (role, text), and how long the answer is to be.

    `prompt_tokens` are those of the whole request with its special tokens where they are known beforehand: not for a
    later turn, whose history has an answer that is still to come, nor for texts of a file or without a tokenizer.
    For an endpoint with a chat template they are those of the texts alone.
    """

    said: Said
    output_tokens: int
    prompt_tokens: int | None = None
    think_s: float = 0.0  # after the answer before it


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    number: int  # in its source, for the report
    turns: tuple[Turn, ...]
    at_s: float | None = None  # since the first of the trace


@dataclass(slots=True)
class Source:
    """`take` goes on where it stopped; the same seed gives the same conversations, however they are taken.

    `size`: how many there are. Those of a trace end there (`timed`), texts without times begin again, and what is made
    does not end (None). `exact`: lengths that were asked for are right by a tokenizer, not by characters.
    """

    stream: Callable[[], Iterator[Conversation]]
    exact: bool
    size: int | None = None
    timed: bool = False
    notes: tuple[str, ...] = ()
    _rest: Iterator[Conversation] | None = field(default=None, repr=False)

    def take(self, amount: int) -> list[Conversation]:
        if self._rest is None:
            self._rest = self.stream()
        return list(islice(self._rest, amount))

    def rewind(self) -> None:
        """The next `take` begins with the first conversation."""
        self._rest = None


def open_source(workload: Workload, tokenizer: Path | None, seed: int, *, templated: bool) -> Source:
    """The conversations of `workload`; a file is read and checked here, its prompts are made as they are taken.

    `templated`: the server puts a chat template around what is said, so special tokens are left to it.
    """
    if workload.file is None:
        exact = tokenizer is not None
        return Source(lambda: _Maker(workload, Cutter(tokenizer, seed=seed), seed, templated).all(), exact)
    cutter = Cutter(tokenizer, seed=seed)
    file = Path(workload.file)
    data = files.read(file)
    notes = (f"`{file.name}`: {data.left_out} rows without an answer are left out",) if data.left_out else ()
    if isinstance(data, Trace):
        replay = _Replay(data, workload, cutter, seed, special=not templated)
        return Source(replay.all, cutter.exact, len(data), True, notes)
    telling = _Telling(data, workload, cutter, seed, templated)
    return Source(telling.all, True, len(data.dialogues), data.timed, notes)


class _Maker:
    """Conversations of held-out text."""

    def __init__(self, workload: Workload, cutter: Cutter, seed: int, templated: bool) -> None:
        self._workload = workload
        self._cutter = cutter
        self._templated = templated
        self._rng = random.Random(f"lengths {seed}")
        self._prefixes: dict[int, tuple[str, int]] = {}
        self._leading = 0 if templated else cutter.special_tokens()[0]

    def all(self) -> Iterator[Conversation]:
        return map(self._one, count())

    def _one(self, number: int) -> Conversation:
        turns = [self._first()]
        for _ in range(draw_tokens(self._workload.turns, self._rng) - 1):
            turns.append(self._later())
        return Conversation(number=number, turns=tuple(turns))

    def _first(self) -> Turn:
        prefix, tokens = self._prefix(self._rng.randrange(self._workload.prefixes))
        tokens += self._length(self._workload.prompt_tokens)
        if not prefix:
            said: Said = (("user", self._cutter.cut(tokens, special=not self._templated)),)
        elif self._templated:
            own = tokens - self._cutter.count(prefix, special=False)
            said = (("system", prefix), ("user", self._cutter.cut(own, special=False)))
        else:
            said = (("system", prefix), ("user", self._cutter.cut(tokens, special=True, after=prefix)))
        known = tokens if self._cutter.exact else None
        return Turn(said=said, output_tokens=draw_tokens(self._workload.output_tokens, self._rng), prompt_tokens=known)

    def _later(self) -> Turn:
        tokens = self._length(self._workload.next_tokens or self._workload.prompt_tokens)
        text = self._cutter.cut(tokens, special=False) if self._templated else self._cutter.cut_on(tokens)
        return Turn(
            said=(("user", text),),
            output_tokens=draw_tokens(self._workload.output_tokens, self._rng),
            think_s=draw_s(self._workload.think_s, self._rng),
        )

    def _prefix(self, group: int) -> tuple[str, int]:
        """The beginning that a group of conversations shares, and its tokens."""
        if group not in self._prefixes:
            length = self._workload.prefix_tokens
            tokens = self._length(length) if length else 0
            own = tokens - self._leading
            self._prefixes[group] = (self._cutter.cut(own, special=False) if own > 0 else "", tokens)
        return self._prefixes[group]

    def _length(self, length: int | Length) -> int:
        drawn = draw_tokens(length, self._rng)
        return max(drawn, _LEAST_DRAWN_TOKENS) if isinstance(length, Length) else drawn


class _Replay:
    """The requests of a trace. Prompts that shared blocks there begin alike here, so that prefix caches do as there."""

    def __init__(self, trace: Trace, workload: Workload, cutter: Cutter, seed: int, *, special: bool) -> None:
        self._trace = trace
        self._workload = workload
        self._cutter = cutter
        self._seed = seed
        self._special = special
        self._special_tokens = sum(cutter.special_tokens()) if special else 0
        self._block = lru_cache(_BLOCKS_KEPT)(self._full_block)

    def all(self) -> Iterator[Conversation]:
        rng = random.Random(f"lengths {self._seed}")
        given = self._workload.output_tokens
        for number, request in enumerate(self._trace.in_order()):
            text, tokens = self._prompt(number, request)
            turn = Turn(
                said=(("user", text),),
                output_tokens=request.output_tokens if given is None else draw_tokens(given, rng),
                prompt_tokens=tokens if self._cutter.exact else None,
            )
            yield Conversation(number=number, turns=(turn,), at_s=request.at_s)

    def _prompt(self, number: int, request: Request) -> tuple[str, int]:
        """Its blocks, the last of which is cut so that the whole has the tokens of the request; and how many it has.

        These are a few more where so few do not hold the special tokens, or where blocks meet in a token more.
        """
        full = request.blocks[:-1]
        name = f"{self._seed}-{request.blocks[-1]}" if request.blocks else f"{self._seed}-r{number}"
        before = "".join(self._block(block, i == 0) for i, block in enumerate(full))
        before_tokens = len(full) * MOONCAKE_BLOCK_TOKENS + self._special_tokens
        for tokens in range(request.prompt_tokens, request.prompt_tokens + _SPARE_TOKENS):
            last = self._cutter.cut_named(name, tokens, special=self._special, after=before, after_tokens=before_tokens)
            if last is not None:
                return before + last, tokens
        message = f"request {number} of the trace: no text has {request.prompt_tokens} tokens with this tokenizer"
        raise LlmoptError(message, hint="leave it out, or use another tokenizer")

    def _full_block(self, block: int, first: bool) -> str:
        name = f"{self._seed}-{block}"
        if first:
            text = self._cutter.cut_named(name, MOONCAKE_BLOCK_TOKENS, special=False)
        else:
            text = self._cutter.cut_named_on(name, MOONCAKE_BLOCK_TOKENS)
        return text or f" {name}"


class _Telling:
    """Conversations with the texts of a file; without times they begin again at the end."""

    def __init__(self, texts: Texts, workload: Workload, cutter: Cutter, seed: int, templated: bool) -> None:
        self._texts = texts
        self._workload = workload
        self._cutter = cutter
        self._seed = seed
        self._templated = templated

    def all(self) -> Iterator[Conversation]:
        rng = random.Random(f"lengths {self._seed}")
        numbered = enumerate(self._texts.dialogues)
        for number, dialogue in numbered if self._texts.timed else cycle(numbered):
            yield self._one(number, dialogue, rng)

    def _one(self, number: int, dialogue: Dialogue, rng: random.Random) -> Conversation:
        turns = self._workload.turns
        rows = dialogue.rows if turns is None else dialogue.rows[: draw_tokens(turns, rng)]
        start_s = self._texts.dialogues[0].at_s
        return Conversation(
            number=number,
            turns=tuple(self._turn(row, i, rng) for i, row in enumerate(rows)),
            at_s=None if dialogue.at_s is None or start_s is None else dialogue.at_s - start_s,
        )

    def _turn(self, row: Row, index: int, rng: random.Random) -> Turn:
        think_s = draw_s(self._workload.think_s, rng) if row.think_s is None else row.think_s
        return Turn(
            said=row.said if self._templated else _separated(row.said, index),
            output_tokens=self._output_tokens(row, rng),
            think_s=think_s if index else 0.0,
        )

    def _output_tokens(self, row: Row, rng: random.Random) -> int:
        if self._workload.output_tokens is None:
            if row.output_tokens is not None:
                return row.output_tokens
            if row.recorded is not None:
                return self._cutter.count(row.recorded, special=False)
        return draw_tokens(self._workload.output_tokens, rng)


def _separated(said: Said, turn: int) -> Said:
    """An endpoint without a template joins texts as they are: a blank line between them, none before the first."""
    return tuple((role, text if turn + i == 0 else f"\n\n{text}") for i, (role, text) in enumerate(said))
