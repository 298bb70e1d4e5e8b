"""The figures that can be gated: what they are called, which way is better, how many requests they need."""

from __future__ import annotations

from typing import Literal

from llmopt.errors import SettingsError, nearest

Better = Literal["lower", "higher"]

# Times of single requests (or gaps): milliseconds, shorter is better; a report has their percentiles.
TIMES = (
    "ttft_ms",
    "ttft_scheduled_ms",
    "answer_ms",
    "itl_ms",
    "itl_request_mean_ms",
    "tpot_ms",
    "e2e_ms",
    "e2e_scheduled_ms",
)
SHARES = ("goodput_share", "error_share")
PERCENTILES = ("p50", "p90", "p95", "p99", "p99.9", "mean")

# What is compared where nobody says: the start, the stream, the whole, the rate.
GATED = ("ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50", "tokens_per_s")

_SCALARS: dict[str, Better] = {
    "tokens_per_s": "higher",
    "total_tokens_per_s": "higher",
    "steady_tokens_per_s": "higher",
    "peak_tokens_per_s": "higher",
    "requests_per_s": "higher",
    "goodput_per_s": "higher",
    "goodput_share": "higher",
    "error_share": "lower",
    "errors": "lower",
    "joules_per_token": "lower",
}
_SINCE_DUE = {"ttft_ms": "ttft_scheduled_ms", "e2e_ms": "e2e_scheduled_ms"}
_BEYOND = 10  # requests that have to lie beyond a percentile before it is more than chance


def names() -> list[str]:
    """Every figure there can be."""
    return [f"{time}_{percentile}" for time in TIMES for percentile in PERCENTILES] + list(_SCALARS)


def split(figure: str) -> tuple[str, str | None]:
    """`ttft_ms_p99` or `ttft_p99_ms` is (`ttft_ms`, `p99`), a rate (its name, None); else a `SettingsError`."""
    words = figure.strip().lower().split("_")
    for at in range(len(words), -1, -1):  # with no word taken out first
        percentile = words[at] if at < len(words) else None
        rest = "_".join(words[:at] + words[at + 1 :])
        metric = rest if rest in TIMES else f"{rest}_ms"
        if metric in TIMES and (percentile is None or percentile in PERCENTILES):
            return metric, percentile
        if percentile is None and rest in _SCALARS:
            return rest, None
    other = next((word for word in words if word[:1] == "p" and word[1:2].isdigit()), None)
    if other is not None and other not in PERCENTILES:
        known = ", ".join(f"`{name}`" for name in PERCENTILES)
        raise SettingsError(f"`{figure}`: reports have no `{other}`", hint=f"take one of {known}")
    raise SettingsError(f"there is no figure `{figure}`", hint=nearest(figure, [*names(), *TIMES]))


def forms(figure: str) -> tuple[str, ...]:
    """What is judged for `figure`, the first that a report has: of an open loop the time since a request was due.

    Counted from its sending, whatever holds requests back would make a slow server look quick (coordinated omission).
    """
    metric, percentile = split(figure)
    own = joined(metric, percentile)
    return (joined(_SINCE_DUE[metric], percentile), own) if metric in _SINCE_DUE else (own,)


def joined(metric: str, percentile: str | None) -> str:
    """The name in a report's compact figures."""
    return metric if percentile is None else f"{metric}_{percentile}"


def better(figure: str) -> Better:
    """Which way `figure` gets better; an unknown one is a `SettingsError`."""
    metric, _ = split(figure)
    return _SCALARS.get(metric, "lower")


def least_requests(figure: str) -> int:
    """The requests of a round from which its `figure` says something: 1,000 for a p99, 20 for a median."""
    percentile = split(figure)[1]
    if percentile is None or percentile == "mean":
        return 2 * _BEYOND
    return round(_BEYOND / (1 - float(percentile[1:]) / 100))
