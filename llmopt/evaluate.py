"""How far a model is from its base: KL divergence, perplexity and top-1 agreement, streamed block by block.

No more than one block of each model is in memory. KL is that of the next-token distributions, base against model, in
nats, averaged over all positions of all windows; perplexity is over the same positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt import backends, harness, memory
from llmopt.artifacts.outcome import Outcome, Progress, within
from llmopt.errors import LlmoptError, SettingsError
from llmopt.profiles.settings import build

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmopt.formats.reading import Source
    from llmopt.models.config import DecoderConfig
    from llmopt.models.parallel import Workers

OP_VERSION = 1
_BATCH_TOKENS = 2048
_HEAD_TOKENS = 512  # logits held at once: 512 x 128k entries of float32 are 256 MB


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """What to measure. `tasks` of lm-evaluation-harness, with `limit` documents each and `fewshot` examples."""

    windows: int = 64
    seq_len: int = 512
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    fewshot: int | None = None

    def __post_init__(self) -> None:
        if self.windows < 1 or self.seq_len < 2:
            raise SettingsError(
                f"cannot evaluate {self.windows} windows of {self.seq_len} tokens",
                hint="at least 1 window of 2 tokens",
            )
        for name, least in (("limit", 1), ("fewshot", 0)):
            value = getattr(self, name)
            if value is not None and not self.tasks:
                raise SettingsError(f"`{name}` is for tasks, and there are none", hint="name them: `tasks: [arc_easy]`")
            if value is not None and value < least:
                raise SettingsError(f"`{name}` cannot be {value}", hint=f"use {least} or more")


def resolve(settings: Mapping[str, Any]) -> EvalSettings:
    """SettingsError for what cannot be; BackendMissingError for tasks without lm-evaluation-harness."""
    resolved = build(EvalSettings, settings, where="eval")
    if resolved.tasks:
        backends.require("lm_eval", extra=harness.EXTRA)
    return resolved


def deps(settings: EvalSettings) -> tuple[str, ...]:
    """The distributions whose versions may change the figures."""
    return ("numpy", "tokenizers", "torch") + (harness.DISTRIBUTIONS if settings.tasks else ())


def check(model: Path, base: Path | None, text: Path, settings: EvalSettings, *, tasks: Path | None = None) -> None:
    """Everything that can be found wrong before the work; `tasks` is a folder of tasks of the user's own."""
    from llmopt.formats.reading import open_model

    config = open_model(model).config
    if base is not None:
        other = open_model(base).config
        if other.vocab_size != config.vocab_size:
            raise LlmoptError(
                f"`{model}` has {config.vocab_size} tokens and its base {other.vocab_size}",
                hint="a model can only be compared with the checkpoint it was made from",
            )
    evaluation_windows(model, text, settings, config)
    if settings.tasks:
        harness.check(_questions(settings, tasks))


def evaluation_windows(model: Path, text: Path, settings: EvalSettings, config: DecoderConfig) -> np.ndarray:
    """Token ids [windows, seq_len], the first of the text."""
    from llmopt.models.text import read_tokens, windows

    if settings.seq_len > config.max_positions:
        raise SettingsError(
            f"`seq_len` cannot be {settings.seq_len}: the model has {config.max_positions} positions",
            hint=f"use {config.max_positions} or less",
        )
    tokens = read_tokens(model, text)
    return windows(tokens, count=settings.windows, length=settings.seq_len, seed=None, what="evaluation text")


def evaluate(
    model: Path,
    base: Path | None,
    text: Path,
    settings: EvalSettings,
    out: Path,
    progress: Progress,
    *,
    tasks: Path | None = None,
) -> Outcome:
    """Write eval.json to `out`. Without a base, only the model's own perplexity and tasks are measured."""
    import torch

    from llmopt.formats.reading import open_model
    from llmopt.models.companions import write_json
    from llmopt.models.parallel import Workers

    loaded = [open_model(path) for path in (model, base) if path is not None]
    tokens = torch.from_numpy(evaluation_windows(model, text, settings, loaded[0].config))
    with torch.no_grad(), Workers() as workers:
        steps = _Steps(progress, sum(each.config.layers for each in loaded))
        hidden = [
            _hidden_states(each, tokens, workers, steps.of(role, each.config))
            for role, each in zip(("model", "base"), loaded, strict=False)
        ]
        metrics = _compare(loaded, hidden, tokens, workers)
        del hidden
        for role, each in zip(("", "base_"), loaded, strict=False) if settings.tasks else ():
            said = within(progress, f"{role.rstrip('_') or 'model'}, tasks", stage=f"{role}tasks")
            results = harness.ask(answerer(each, workers, said), _questions(settings, tasks))
            for name, figure in harness.figures(results).items():
                task, _, metric = name.partition("/")
                metrics[f"{task}/{role}{metric}"] = _rounded(figure)
    write_json(out / "eval.json", metrics)
    return Outcome(metrics=metrics)


@dataclass(slots=True)
class _Steps:
    """Says which block of which model is done, and counts those of all models together."""

    progress: Progress
    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def of(self, role: str, config: DecoderConfig) -> Callable[[int], None]:
        """What a walk over the blocks of one model calls with the number of each, once that is done."""

        def say(index: int) -> None:
            now = time.monotonic()
            self.done, seconds, self.began = self.done + 1, now - self.began, now
            self.progress(
                f"{role}, block {index + 1}/{config.layers}",
                stage="eval",
                model=role,
                block=config.block(index),
                done=self.done,
                total=self.total,
                seconds=round(seconds, 3),
                **memory.usage(),
            )

        return say


def _hidden_states(
    model: Source, tokens: torch.Tensor, workers: Workers, finished: Callable[[int], None]
) -> list[torch.Tensor]:
    """The final norm's outputs, one [T, H] a window."""
    import torch

    from llmopt.formats.dequantized import load_block
    from llmopt.models.decoder import embed, final_norm, position_tables

    checkpoint, config = model.checkpoint, model.config
    step = max(1, _BATCH_TOKENS // tokens.shape[1])
    batches = [embed(checkpoint, config, part) for part in torch.split(tokens, step)]
    tables = position_tables(config, tokens.shape[1])
    for index in range(config.layers):
        block = load_block(checkpoint, config, model.reader, index)
        batches = list(workers.map(lambda x, block=block: block.forward(x, tables), batches))  # type: ignore[misc]
        checkpoint.release()
        finished(index)
    norm = final_norm(checkpoint, config)
    return [window for x in batches for window in norm(x)]


def _compare(
    models: list[Source], hidden: list[list[torch.Tensor]], tokens: torch.Tensor, workers: Workers
) -> dict[str, Any]:
    """Metrics of the first model, against the second where there is one."""
    import torch

    from llmopt.formats.dequantized import load_head

    heads = [(load_head(m.checkpoint, m.config, m.reader), m.config) for m in models]

    def window(number: int) -> list[torch.Tensor]:
        return _compare_window([states[number] for states in hidden], heads, tokens[number])

    columns = [torch.cat(parts).double() for parts in zip(*workers.map(window, range(len(tokens))), strict=True)]
    loss, rest = columns[0], columns[1:]
    metrics: dict[str, Any] = {"tokens": loss.numel(), "perplexity": _rounded(math.exp(loss.mean()))}
    if rest:
        base_loss, divergence, agreement = rest
        metrics |= {
            "base_perplexity": _rounded(math.exp(base_loss.mean())),
            "kl_mean": _rounded(float(divergence.mean())),
            "kl_p99": _rounded(float(divergence.quantile(0.99))),
            "top1_agreement": _rounded(float(agreement.mean())),
        }
    return metrics


def _compare_window(
    hidden: list[torch.Tensor], heads: list[tuple[torch.Tensor, DecoderConfig]], ids: torch.Tensor
) -> list[torch.Tensor]:
    """For each position of one window: the first model's loss; with a second its loss, the KL and the agreement."""
    import torch

    from llmopt.models.decoder import logits

    parts: list[list[torch.Tensor]] = []
    for start in range(0, len(ids) - 1, _HEAD_TOKENS):
        part = slice(start, min(start + _HEAD_TOKENS, len(ids) - 1))
        target = ids[part.start + 1 : part.stop + 1, None]
        logs = [
            torch.log_softmax(logits(states[part], *head), dim=-1) for states, head in zip(hidden, heads, strict=True)
        ]
        found = [-log.gather(1, target)[:, 0] for log in logs]
        if len(logs) == 2:
            own, base = logs
            found.append((base.exp() * (base - own)).sum(dim=-1))
            found.append((own.argmax(dim=-1) == base.argmax(dim=-1)).float())
        parts.append(found)
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _questions(settings: EvalSettings, folder: Path | None) -> harness.Questions:
    absolute = None if folder is None else folder.resolve()
    return harness.Questions(tasks=settings.tasks, folder=absolute, limit=settings.limit, fewshot=settings.fewshot)


def answerer(model: Source, workers: Workers, progress: Progress) -> harness.Answerer:
    """The model as the harness asks it; gradients must be off."""
    import torch

    from llmopt.formats.dequantized import load_head
    from llmopt.models.decoder import logits

    config = model.config
    head = load_head(model.checkpoint, config, model.reader)
    return harness.Answerer(
        folder=model.checkpoint.path,
        positions=config.max_positions,
        hidden_size=config.hidden_size,
        blocks=[config.block(index) for index in range(config.layers)],
        hidden=lambda ids, finished: _hidden_states(model, ids, workers, finished),
        log_probs=lambda states: torch.log_softmax(logits(states, head, config), dim=-1),
        workers=workers,
        progress=progress,
    )


def _rounded(value: float) -> float:
    """Six significant digits: what the float32 sums behind it carry."""
    return float(f"{value:.6g}")
