"""Where what was measured comes from, and what each step made of its size and quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from llmopt.artifacts.disk import byte_size
from llmopt.bench.report.words import Report, number

#: What a step's metrics say of quality, in the order of their columns.
_QUALITY = (
    ("bits_per_weight", "bits per weight"), ("perplexity", "perplexity"), ("kl_mean", "KL from base, nats"),
    ("top1_agreement", "same top token"), ("relative_error_mean", "mean relative error"),
)  # fmt: skip


def lineage(report: Report) -> Iterator[str]:
    """Checkpoint first, as it was made. Nothing for a subject that is only a URL."""
    every = [step for of in report["subjects"].values() for step in of.get("lineage") or ()]
    largest = max((step.get("bytes") or 0 for step in every), default=0)
    columns = [(key, title) for key, title in _QUALITY if any(key in _metrics(step) for step in every)]
    for name, of in report["subjects"].items():
        steps = list(reversed(of.get("lineage") or ()))
        if steps:
            yield f'<h3>{escape(name)}</h3><div class="scroll" tabindex="0"><table class="lineage"><thead><tr>'
            titles = ("step", "artifact", "size", "", *(title for _, title in columns))
            kinds = ("word", "word", "", "word", *("" for _ in columns))
            yield "".join(f'<th scope=col class="{k}">{t}</th>' for k, t in zip(kinds, titles, strict=True))
            yield "</tr></thead><tbody>"
            for step in steps:
                yield from _row(step, columns, largest)
            yield "</tbody></table></div>"


def _row(step: Mapping[str, Any], columns: list[tuple[str, str]], largest: int) -> Iterator[str]:
    size = step.get("bytes")
    license_ = f", license {step['license']}" if step.get("license") else ""
    bar = f'<i style="width:{100 * size / largest:.1f}%"></i>' if size else ""
    yield f'<tr><td class="word"><b>{escape(str(step.get("op") or step["kind"]))}</b>'
    yield f"<small>{escape(_about(step)[:120] + license_)}</small></td>"
    yield f'<td class="word"><code title="{escape(str(step["id"]))}">{escape(str(step["id"])[:15])}</code></td>'
    yield f"<td>{escape(byte_size(size)) if size else '-'}</td>"
    yield f'<td class="word size">{bar}</td>'
    for key, _ in columns:
        value, base = _metrics(step).get(key), _metrics(step).get(f"base_{key}")
        was = f"<small>base {number(base)}</small>" if base is not None else ""
        yield f"<td>{_digits(value)}{was}</td>"
    yield "</tr>"


def _about(step: Mapping[str, Any]) -> str:
    """Where it is from, else how it was made."""
    settings: Mapping[str, Any] = step.get("settings") or {}
    short = (f"{key} {value}" for key, value in settings.items() if type(value) in (str, int, float))
    return str(step.get("source") or ", ".join(short))


def _metrics(step: Mapping[str, Any]) -> Mapping[str, Any]:
    found = step.get("metrics")
    return found if isinstance(found, Mapping) else {}


def _digits(value: Any) -> str:
    """Small numbers with the digits that tell them apart: a KL is often 0.0004."""
    return f"{value:.4g}" if isinstance(value, float) else number(value)
