"""Tasks of lm-evaluation-harness, asked of any checkpoint that `llmopt eval` reads.

The harness turns a task into requests and their answers into metrics. In between stands our own forward pass: requests
become token ids and go through the model together, block by block, a bounded number of tokens at a time. So every
format is evaluated as its integers and its rounded activations say, and no more than one block is in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt import backends, memory
from llmopt.artifacts.outcome import Progress
from llmopt.errors import LlmoptError, SettingsError, nearest

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from llmopt.models.parallel import Workers

EXTRA = "lm-eval"
DISTRIBUTIONS = ("lm_eval", "datasets")
_PACK_ENTRIES = 1 << 26  # of float32 hidden states on their way through the blocks at once: 256 MB
_HEAD_TOKENS = 512  # logits held at once: 512 x 128k entries of float32 are 256 MB
_TOLD_TOKENS = 32  # of each text being written, between one line of progress and the next
_BOOTSTRAPS = 1000  # for the standard errors that have no formula
_SEED = 1234  # of what the harness draws: few-shot examples and bootstraps; its own default

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What to ask. `folder` is absolute; `limit` (None: all) counts the documents of each task."""

    tasks: tuple[str, ...]
    folder: Path | None
    limit: int | None
    fewshot: int | None  # None: as the task says


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """A model as the harness needs it.

    `hidden` takes right-padded token ids [N, T], gives the final norm's outputs, [T, H] a row, and calls back with the
    number of each block that is done. `log_probs` makes [P, V] of [P, H].
    """

    folder: Path
    positions: int
    hidden_size: int
    blocks: Sequence[str]
    hidden: Callable[[torch.Tensor, Callable[[int], None]], list[torch.Tensor]]
    log_probs: Callable[[torch.Tensor], torch.Tensor]
    workers: Workers
    progress: Progress

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it.

        What is too long loses its beginning. Inputs that are the same (choices of one token) are computed once.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        found: dict[int, tuple[float, bool]] = {}
        for number, (context, continuation) in enumerate(pairs):
            ids = (context + continuation)[-(self.positions + 1) :][:-1]
            if continuation:
                rows.setdefault(tuple(ids), []).append(number)
            else:
                found[number] = (0.0, True)
        packs = list(self._packs(list(rows)))
        for at, pack in enumerate(packs):
            states = dict(zip(pack, self._states(pack, at, len(packs)), strict=True))
            asked = [(states[row][: len(row)], number) for row in pack for number in rows[row]]
            scores = self.workers.map(lambda each: self._score(each[0], pairs[each[1]][1]), asked)
            found.update(zip((number for _, number in asked), scores, strict=True))
        return [found[number] for number in range(len(pairs))]

    def next_tokens(self, contexts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each of these."""
        import torch

        rows = list(dict.fromkeys(tuple(context[-self.positions :]) for context in contexts))
        found: dict[tuple[int, ...], int] = {}
        for pack in self._packs(rows):
            states = self.hidden(_padded(pack), lambda _: None)
            last_PH = torch.stack([state[len(row) - 1] for row, state in zip(pack, states, strict=True)])
            best = torch.cat([self.log_probs(part).argmax(dim=-1) for part in torch.split(last_PH, _HEAD_TOKENS)])
            found.update(zip(pack, best.tolist(), strict=True))
        return [found[tuple(context[-self.positions :])] for context in contexts]

    def _packs(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """The longest first, as many together as one pass may hold when padded to the length of the first."""
        pack: list[tuple[int, ...]] = []
        for row in sorted(rows, key=lambda row: (-len(row), row)):
            if pack and (len(pack) + 1) * len(pack[0]) * self.hidden_size > _PACK_ENTRIES:
                yield pack
                pack = []
            pack.append(row)
        if pack:
            yield pack

    def _states(self, pack: Sequence[tuple[int, ...]], at: int, packs: int) -> list[torch.Tensor]:
        began = time.monotonic()
        blocks = len(self.blocks)

        def finished(index: int) -> None:
            nonlocal began
            now = time.monotonic()
            seconds, began = now - began, now
            self.progress(
                f"pass {at + 1}/{packs} over {len(pack)} inputs, block {index + 1}/{blocks}",
                block=self.blocks[index],
                done=at * blocks + index + 1,
                total=packs * blocks,
                seconds=round(seconds, 3),
                **memory.usage(),
            )

        return self.hidden(_padded(pack), finished)

    def _score(self, states_TH: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        import torch

        wanted = torch.tensor(continuation[-len(states_TH) :])
        parts = (torch.split(each, _HEAD_TOKENS) for each in (states_TH[-len(wanted) :], wanted))
        total, greedy = 0.0, True
        for states, ids in zip(*parts, strict=True):
            logs_PV = self.log_probs(states)
            total += float(logs_PV.gather(1, ids[:, None]).double().sum())
            greedy = greedy and bool((logs_PV.argmax(dim=-1) == ids).all())
        return total, greedy


def check(questions: Questions) -> None:
    """SettingsError for a task that there is none of; BackendMissingError without the harness."""
    _manager(questions)


def ask(answerer: Answerer, questions: Questions) -> dict[str, Any]:
    """The harness's results: `{task: {"metric,filter": figure, ...}}`."""
    evaluator = backends.load("lm_eval.evaluator", extra=EXTRA)
    with _quiet(answerer.progress):
        tasks = _load(questions)
        model = _language_model(answerer)
        random.seed(_SEED)  # for the few tasks that draw without a seed of their own
        results = evaluator.evaluate(
            lm=model, task_dict=tasks, limit=questions.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
        )
    found = results["results"]
    assert isinstance(found, dict)
    return found


def figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`task/metric` of every number, with the filter behind the metric's name where a task has one."""
    found: dict[str, float] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{task}/{metric}" + (f",{chosen}" if chosen != "none" else "")] = float(value)
    return found


def _manager(questions: Questions) -> Any:
    """A task manager that knows all of the tasks; that of the harness's own tasks takes a while to make."""
    folder = None if questions.folder is None else str(questions.folder)
    for own in (True, False) if folder else (False,):
        manager = _index(folder, own)
        if not (unknown := [task for task in questions.tasks if not manager.match_tasks([task])]):
            return manager
    raise SettingsError(f"lm-evaluation-harness has no task `{unknown[0]}`", hint=_nearest_task(unknown[0], manager))


def _nearest_task(task: str, manager: Any) -> str:
    """There are thousands: all of them would be no hint."""
    hint = nearest(task, manager.all_tasks)
    return hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists them; `--tasks-path` adds your own"


@lru_cache(maxsize=2)
def _index(folder: str | None, only_folder: bool) -> Any:
    tasks = backends.load("lm_eval.tasks", extra=EXTRA)
    return tasks.TaskManager(include_path=folder, include_defaults=not only_folder)


def _load(questions: Questions) -> Any:
    """The tasks with their data. Files named in a task of the user's own are relative to its folder."""
    manager = _manager(questions)
    names = [name for task in questions.tasks for name in manager.match_tasks([task])]
    try:
        with contextlib.chdir(questions.folder or Path.cwd()):
            loaded = manager.load(list(dict.fromkeys(names)))
    except Exception as error:  # of many libraries, and all of them mean that the task or its data is not to be had
        raise LlmoptError(
            f"the tasks `{', '.join(questions.tasks)}` cannot be loaded: {_first_line(error)}",
            hint="their data comes from the Hugging Face hub, or from the files that the task's YAML names",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise LlmoptError(f"the task `{name}` runs code that a model wrote", hint="leave it out of `--tasks`")
        own = task.get_config("num_fewshot")
        if own is None or (questions.fewshot is not None and own != 0):  # 0: the task is made to have none
            task.set_config(key="num_fewshot", value=questions.fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _language_model(answerer: Answerer) -> Any:
    """The answerer in the harness's own terms."""
    api = backends.load("lm_eval.api.model", extra=EXTRA)
    text = _Text.read(answerer.folder)

    class Streamed(api.TemplateLM):  # type: ignore[misc, name-defined]
        @property
        def eot_token_id(self) -> int:
            return text.end

        @property
        def prefix_token_id(self) -> int:
            return text.start

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return text.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answerer.loglikelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows = [_windows(text.encode(*request.args), text.start, answerer.positions) for request in requests]
            scores = iter(answerer.loglikelihoods([pair for part in windows for pair in part]))
            return [sum(next(scores)[0] for _ in part) for part in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return _generate(answerer, text, [request.args for request in requests])

    return Streamed()


def _windows(ids: list[int], start: int, positions: int) -> list[Pair]:
    """A whole document in windows without overlap, as the harness cuts it: every token is predicted once."""
    utils = backends.load("lm_eval.utils", extra=EXTRA)
    rolling = utils.get_rolling_token_windows(token_list=ids, prefix_token=start, max_seq_len=positions, context_len=1)
    return [utils.make_disjoint_window(window) for window in rolling]


def _generate(answerer: Answerer, text: _Text, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Greedy continuations. There is no cache of keys and values: each token costs a pass over the model."""
    utils = backends.load("lm_eval.models.utils", extra=EXTRA)
    contexts, stops, most = [], [], []
    for context, given in requests:
        options = utils.normalize_gen_kwargs(given, 256)
        if options.get("do_sample"):
            raise LlmoptError("a task draws its text at random", hint="set `do_sample: false` in its generation_kwargs")
        stops.append(utils.handle_stop_sequences(options["until"], eos=text.decode([text.end], special=True)))
        most.append(min(int(options["max_gen_toks"]), answerer.positions - 1))
        contexts.append(text.encode(context)[-(answerer.positions - most[-1]) :] or [text.start])
    made: list[list[int]] = [[] for _ in requests]
    going = [number for number in range(len(requests)) if most[number] > 0]
    while going:
        tokens = answerer.next_tokens([contexts[number] + made[number] for number in going])
        for number, token in zip(going, tokens, strict=True):
            made[number].append(token)
        length = max(len(made[number]) for number in going)
        if length % _TOLD_TOKENS == 0:
            answerer.progress(f"{len(going)} texts have {length} tokens", **memory.usage())
        going = [
            number
            for number in going
            if len(made[number]) < most[number]
            and made[number][-1] not in text.ends
            and not any(stop and stop in text.decode(made[number]) for stop in stops[number])
        ]
    return [
        utils.postprocess_generated_text(text.decode(ids), stop, None) for ids, stop in zip(made, stops, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Text:
    """A checkpoint's tokenizer. `start` stands for an empty context; `end` ends a text, as any of `ends` does."""

    tokenizer: Tokenizer
    start: int
    end: int
    ends: frozenset[int]

    @classmethod
    def read(cls, folder: Path) -> _Text:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        named = _json(folder / "tokenizer_config.json")
        found = {key: _token(tokenizer, named.get(key)) for key in ("bos_token", "eos_token")}
        listed = [
            token
            for file in ("generation_config.json", "config.json")
            for token in _listed(_json(folder / file).get("eos_token_id"))
        ]
        end = found["eos_token"] if found["eos_token"] is not None else next(iter(listed), None)
        if end is None:
            raise LlmoptError(
                f"no file in `{folder}` says which token ends a text", hint="set `eos_token_id` in config.json"
            )
        start = end if found["bos_token"] is None else found["bos_token"]
        return cls(tokenizer, start, end, frozenset([end, *listed]))

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """With the special tokens that the tokenizer adds (unless the text has them already), or as `special` says."""
        if special is None:
            special = not text.startswith(self.decode([self.start], special=True))
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))


def _token(tokenizer: Tokenizer, named: Any) -> int | None:
    name = named.get("content") if isinstance(named, dict) else named
    return tokenizer.token_to_id(name) if isinstance(name, str) else None


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N, T] with zeros at the end of the shorter: nothing that counts looks there, as attention is causal."""
    import torch

    most = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (most - len(row))] for row in rows])


@contextlib.contextmanager
def _quiet(progress: Progress) -> Iterator[None]:
    """The harness's warnings go to progress, and what else it prints and draws nowhere: stdout is for the result."""
    log, handler = logging.getLogger("lm_eval"), _Warnings(progress)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), _no_bars(), _one_process():
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Warnings(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress(f"lm-evaluation-harness: {record.getMessage()}")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The progress is ours to draw."""
    bars = backends.load("tqdm", extra=EXTRA).tqdm
    init = bars.__init__

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "disable": True})

    bars.__init__ = disabled
    try:
        yield
    finally:
        bars.__init__ = init


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Bootstraps in this process: a fork of it would copy its threads' locks."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
