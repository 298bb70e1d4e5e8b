"""The progress bar: a stage's steps, the time left, memory, and the worst linear of the last block or the load now.

Imported only when there is a terminal and something to count, since it loads rich.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.outcome import Json
from llmopt.cli.live import LoadView, clock

_BAR_COLUMNS = 24


class Bar:
    """On stderr until `close`, which leaves its last state there. Colours are rich's affair, and so is NO_COLOR."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        # stdout is the result's; what others write to stderr meanwhile is put above the bar.
        self._live = Live(
            self, console=self._console, refresh_per_second=2, redirect_stdout=False, vertical_overflow="crop"
        )
        self._facts: dict[str, Json] = {}
        self._load: LoadView | None = None
        self._started = self._updated = 0.0
        self._live.start()

    def update(self, facts: Mapping[str, Json]) -> None:
        """Another step is done. A new stage begins a new bar, below what the last one came to."""
        self._load = None
        now = time.monotonic()
        if facts.get("stage") != self._facts.get("stage"):
            if self._facts:
                self._live.console.print(self)
            self._started = now - _number(facts.get("seconds"))
        self._facts, self._updated = dict(facts), now
        self._live.refresh()

    def watch(self, facts: Mapping[str, Json]) -> None:
        """A load is so far; it is shown until the next step."""
        self._load = self._load or LoadView()
        self._load.update(facts)
        self._live.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._live.console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        self._load = None
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._facts:
            yield self._counts()
            if (worst := self._worst()) is not None:
                yield worst
        if self._load is not None:
            yield self._load

    def _counts(self) -> Table:
        facts, done, total = self._facts, _number(self._facts.get("done")), _number(self._facts.get("total"))
        row = Table.grid(padding=(0, 1))
        for _ in range(5):
            row.add_column(no_wrap=True)
        row.add_row(
            str(facts.get("step") or facts.get("stage") or ""),
            ProgressBar(total=total, completed=done, width=_BAR_COLUMNS),
            _count(facts, done, total),
            self._time(done, total),
            _memory(facts),
        )
        return row

    def _time(self, done: float, total: float) -> str:
        eta_s = self._facts.get("eta_s")
        if done >= total:
            return f"took {clock(self._updated - self._started)}"
        return "" if eta_s is None else f"{clock(_number(eta_s) - (time.monotonic() - self._updated))} left"

    def _worst(self) -> Text | None:
        """Of the last block: the linear whose outputs are furthest off."""
        errors = self._facts.get("errors")
        if not isinstance(errors, dict) or not errors:
            return None
        name, error = max(errors.items(), key=lambda item: _number(item[1]))
        block = self._facts.get("block")
        if block is not None and not name.startswith(f"{block}."):
            name = f"{block}.{name}"
        return Text(f"  worst relative error {_number(error):.4f} in {name}", no_wrap=True, overflow="ellipsis")


def _count(facts: Mapping[str, Json], done: float, total: float) -> str:
    if facts.get("unit") == "bytes":
        return f"{byte_size(int(done))}/{byte_size(int(total))}, {byte_size(int(_number(facts.get('bytes_per_s'))))}/s"
    return f"{done:.0f}/{total:.0f}" + (" blocks" if "block" in facts else "")


def _memory(facts: Mapping[str, Json]) -> str:
    now, peak = facts.get("rss_bytes"), facts.get("peak_rss_bytes")
    parts = [byte_size(int(_number(now)))] if now is not None else []
    return ", ".join(parts + ([f"peak {byte_size(int(_number(peak)))}"] if peak is not None else []))


def _number(value: Json) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
