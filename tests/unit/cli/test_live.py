"""The view of a load while it runs."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from llmopt.artifacts.outcome import Json
from llmopt.cli.live import LoadView, sparkline

#: Two loads of one bench, each told of twice a second for a minute, in no time.
OnATerminal = Callable[..., tuple[str, str]]

WORK = """
import sys
from llmopt.cli import console
c = console.start(as_json=False, quiet=False, verbose=False, as_lines="--json-lines" in sys.argv)
for number in range(2):
    for tick in range(1, 121):
        c.progress("under load", stage="load", subject="candidate", load="c4", round=number, in_flight=4,
                   ended=tick * 2, failed=tick // 60, tokens=tick * 200, seconds=tick / 2, duration_s=90)
    c.progress(f"candidate c4: {number + 1} done", stage="bench", done=number + 1, total=2, seconds=60.0)
c.result("done", {})
"""


def facts(seconds: float, **more: Json) -> dict[str, Json]:
    base: dict[str, Json] = {"stage": "load", "subject": "candidate", "load": "c4", "round": 0, "in_flight": 4}
    return base | {"ended": int(4 * seconds), "failed": 0, "tokens": int(100 * seconds), "seconds": seconds} | more


def drawn(view: LoadView, width: int = 90, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, color_system=None, legacy_windows=False)
    console.print(view)
    file.seek(0)
    return file.read()


def watched(*steps: dict[str, Json]) -> LoadView:
    view = LoadView()
    for step in steps:
        view.update(step)
    return view


def test_it_says_what_is_happening() -> None:
    text = drawn(watched(facts(10.0), facts(12.0, failed=3)))
    for piece in (
        "candidate c4, round 1",
        "0:12",
        "4 in flight",
        "48 ended",
        "3 failed",
        "4.0 requests/s",
        "100 tokens/s",
    ):
        assert piece in text


def test_tokens_are_those_of_now() -> None:
    assert "500 tokens/s" in drawn(watched(facts(10.0, tokens=1000), facts(12.0, tokens=2000)))


@pytest.mark.parametrize(
    ("known", "left"),
    [
        ({"duration_s": 30.0}, "0:20 left"),
        ({"total": 60}, "0:05 left"),
        ({"total": 60, "duration_s": 30.0}, "0:05 left"),
        ({"total": 4000, "duration_s": 30.0}, "0:20 left"),
        ({}, "0:10  "),
    ],
)
def test_what_is_left_is_the_sooner_end(known: dict[str, Json], left: str) -> None:
    assert left in drawn(watched(facts(10.0, **known)))


def test_another_load_begins_anew() -> None:
    view = watched(facts(10.0), facts(11.0), facts(0.5, round=1, tokens=10))
    assert "20 tokens/s" in drawn(view)
    assert drawn(view).count("█") == 1


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_it_fits_the_terminal(width: int) -> None:
    view = watched(*(facts(tick / 2, tokens=tick * tick) for tick in range(1, 400)))
    lines = drawn(view, width).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= width


def test_a_terminal_without_unicode_gets_ascii() -> None:
    text = drawn(watched(*(facts(tick / 2, tokens=tick * tick) for tick in range(1, 40))), encoding="ascii")
    assert text.isascii()
    assert "%" in text


def test_a_sparkline_shows_all_that_is_not_nothing() -> None:
    assert "".join(sparkline([0.0, 0.001, 50.0, 100.0])) == " ▁▄█"
    assert "".join(sparkline([0.0, 0.0])) == "  "
    assert "".join(sparkline([])) == ""


def test_a_terminal_sees_the_load_below_the_bar(on_a_terminal: OnATerminal) -> None:
    out, sent = on_a_terminal(WORK, NO_COLOR="1")
    assert out == "done\n"
    for piece in (
        "candidate c4, round 2",
        "0:30 left",
        "4.0 requests/s",
        "400 tokens/s",
        "1/2",
        "candidate c4: 1 done",
    ):
        assert piece in sent
    after = sent[sent.rindex("2/2") :]
    assert "in flight" not in after  # the last state is what it came to, not a load that has ended


def test_a_log_is_not_filled_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines() == ["candidate c4: 1 done", "candidate c4: 2 done"]


def test_a_machine_gets_it_as_events() -> None:
    command = [sys.executable, "-c", WORK, "--json-lines"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count('"stage": "load"') == 240
