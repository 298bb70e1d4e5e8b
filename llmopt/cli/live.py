"""A load while it runs: how far it is, what is in flight, what comes back. Drawn by the bar, below its counts.

Imported only when there is a terminal and a load, since it loads rich.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from llmopt.artifacts.outcome import Json

_RECENT = 120  # rates kept for the sparkline
_BARS, _PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#%"


class LoadView:
    """Fed by facts about twice a second: `subject`, `load`, `round`, `in_flight`, `ended`, `failed`, `tokens` and
    `seconds` since the load's start, and what tells its end: `total` requests or `duration_s`."""

    def __init__(self) -> None:
        self._facts: Mapping[str, Json] = {}
        self._rates: deque[float] = deque(maxlen=_RECENT)

    def update(self, facts: Mapping[str, Json]) -> None:
        """A load that is another one begins anew."""
        if _name(facts) != _name(self._facts) or _number(facts, "seconds") < _number(self._facts, "seconds"):
            self._facts = {}
            self._rates.clear()
        passed_s = _number(facts, "seconds") - _number(self._facts, "seconds")
        if passed_s > 0:
            self._rates.append(max(0.0, _number(facts, "tokens") - _number(self._facts, "tokens")) / passed_s)
        self._facts = dict(facts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._state()
        yield self._speed(options.max_width, _PLAIN_BARS if options.ascii_only else _BARS)

    def _state(self) -> Text:
        facts, failed = self._facts, _number(self._facts, "failed")
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"  {_name(facts)}", style="bold")
        line.append(f"  {clock(_number(facts, 'seconds'))}{self._left()}")
        line.append(f"  {_number(facts, 'in_flight'):.0f} in flight, {_number(facts, 'ended'):.0f} ended")
        line.append(f", {failed:.0f} failed", style="bold red" if failed else "")
        return line

    def _left(self) -> str:
        left_s = self._left_s()
        return "" if left_s is None else f", {clock(left_s)} left"

    def _left_s(self) -> float | None:
        """By the clock, by the requests still to come, or by the sooner of both."""
        seconds, ended = _number(self._facts, "seconds"), _number(self._facts, "ended")
        ends = []
        if (duration_s := _number(self._facts, "duration_s")) > 0:
            ends.append(duration_s - seconds)
        if (total := _number(self._facts, "total")) > 0 and ended:
            ends.append((total - ended) * seconds / ended)
        return max(0.0, min(ends)) if ends else None

    def _speed(self, width: int, bars: str) -> Text:
        seconds = _number(self._facts, "seconds")
        requests_per_s = _number(self._facts, "ended") / seconds if seconds else 0.0
        now = self._rates[-1] if self._rates else 0.0
        line = Text(f"  {requests_per_s:.1f} requests/s  {now:.0f} tokens/s  ", no_wrap=True, overflow="crop")
        line.append("".join(sparkline(list(self._rates)[-max(0, width - len(line) - 1) :], bars)), style="cyan")
        return line


def sparkline(values: list[float], bars: str = _BARS) -> Iterator[str]:
    """A character a value, from nothing at 0 to a full block at the highest; what is above 0 is seen."""
    top = max(values, default=0.0)
    for value in values:
        height = round(value / top * (len(bars) - 1)) if top else 0
        yield bars[max(height, 1) if value > 0 else 0]


def clock(seconds: float) -> str:
    """`0:05`, `12:34` or `1:02:03`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _name(facts: Mapping[str, Json]) -> str:
    round_ = facts.get("round")
    named = f"{facts.get('subject', '')} {facts.get('load', '')}"
    return f"{named}, round {round_ + 1}" if isinstance(round_, int) else named


def _number(facts: Mapping[str, Json], name: str) -> float:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
