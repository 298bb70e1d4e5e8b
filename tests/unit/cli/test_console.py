"""Progress: lines for people, a bar on a terminal, events for machines."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt.artifacts.outcome import silent, within
from llmopt.cli import console

Llmopt = Callable[..., Any]
EVAL = ("--windows", 2, "--seq-len", 32)

#: Three blocks, the first of them done by an earlier process, and something to know about the second.
OnATerminal = Callable[..., tuple[str, str]]

WORK = """
import sys
from llmopt.cli import console
c = console.start(as_json=False, quiet="quiet" in sys.argv, verbose="verbose" in sys.argv)
c.progress("reading [the] model")
before = sorted(m for m in sys.modules if m.partition(".")[0] == "rich")
for i in range(3):
    facts = {"seconds": 60.0} if i else {}
    c.progress(f"block {i + 1}/3: fine", stage="quantize", done=i + 1, total=3, block=f"model.layers.{i}",
               errors={"mlp.up_proj": 0.01, "mlp.down_proj": 0.05 + i}, rss_bytes=3 << 30, peak_rss_bytes=4 << 30,
               **facts)
    if i == 1:
        c.progress("`down_proj` rounded to nearest [really]")
c.result("done", {})
print(before, "rich" in sys.modules)
"""


def test_a_terminal_gets_a_bar(on_a_terminal: OnATerminal) -> None:
    out, sent = on_a_terminal(WORK, NO_COLOR="")
    assert out == "done\n[] True\n"  # rich came with the first step, not before
    for piece in (
        "quantize",
        "3/3 blocks",
        "3.0 GiB, peak 4.0 GiB",
        "worst relative error 2.0500 in",
        "layers.2.mlp.down",
    ):
        assert piece in sent
    assert "1:00 left" in sent  # one block to go after the second; the first took no time of this process
    assert "\x1b[38;" in sent


@pytest.mark.parametrize("name", ["mlp.up_proj", "model.layers.3.mlp.up_proj"])
def test_the_worst_linear_is_named_once_and_in_full(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    from llmopt.cli.bar import Bar

    bar = Bar()
    bar.update({"stage": "quantize", "done": 1, "total": 2, "block": "model.layers.3", "errors": {name: 0.1}})
    bar.close()
    assert "worst relative error 0.1000 in model.layers.3.mlp.up_proj" in capfd.readouterr().err


def test_lines_that_are_no_block_are_shown_above_the_bar(on_a_terminal: OnATerminal) -> None:
    _, sent = on_a_terminal(WORK)
    assert "reading [the] model" in sent
    assert "`down_proj` rounded to nearest [really]" in sent
    assert "block 1/3" not in sent


def test_verbose_shows_the_blocks_too(on_a_terminal: OnATerminal) -> None:
    assert "block 1/3: fine" in on_a_terminal(WORK, "verbose")[1]


def test_no_color_is_a_bar_without_colour(on_a_terminal: OnATerminal) -> None:
    _, sent = on_a_terminal(WORK, NO_COLOR="1")
    assert "3/3 blocks" in sent
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", sent)


def test_quiet_has_no_bar(on_a_terminal: OnATerminal) -> None:
    assert on_a_terminal(WORK, "quiet") == ("done\n[] False\n", "")


def test_a_dumb_terminal_gets_lines(on_a_terminal: OnATerminal) -> None:
    out, sent = on_a_terminal(WORK, TERM="dumb")
    assert out == "done\n[] False\n"
    assert sent.replace("\r\n", "\n").splitlines() == [
        "reading [the] model", "block 1/3: fine", "block 2/3: fine", "`down_proj` rounded to nearest [really]",
        "block 3/3: fine",
    ]  # fmt: skip


def test_without_a_terminal_there_are_the_same_lines_and_no_rich() -> None:
    ran = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "done\n[] False\n"
    assert ran.stderr.splitlines()[1:3] == ["block 1/3: fine", "block 2/3: fine"]
    assert "\x1b" not in ran.stderr


def test_json_lines_are_events_and_last_the_result(llmopt: Llmopt, tiny: Path) -> None:
    ran = llmopt("eval", tiny, "--against", tiny, *EVAL, "--json-lines")
    assert ran.code == 0
    assert ran.err == ""
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["event"] for event in events] == ["progress"] * 4 + ["result"]
    steps, result = events[:-1], events[-1]
    assert [(step["stage"], step["model"], step["done"], step["total"], step["block"]) for step in steps] == [
        ("eval", "model", 1, 4, "model.layers.0"),
        ("eval", "model", 2, 4, "model.layers.1"),
        ("eval", "base", 3, 4, "model.layers.0"),
        ("eval", "base", 4, 4, "model.layers.1"),
    ]
    assert steps[0]["line"] == "model, block 1/2"
    assert all(step["time_s"] >= 0 and step["seconds"] >= 0 for step in steps)
    assert all(step["peak_rss_bytes"] >= step["rss_bytes"] > 10 << 20 for step in steps)
    assert (steps[0]["eta_s"] >= 0, steps[-1]["eta_s"]) == (True, 0)
    same = llmopt("eval", tiny, "--against", tiny, *EVAL, "--json").json
    assert {k: v for k, v in result.items() if k not in ("event", "cached", "seconds")} == {
        k: v for k, v in same.items() if k not in ("cached", "seconds")
    }


def test_a_run_says_which_step_speaks(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"model: {tiny}\neval: {{windows: 2, seq_len: 32}}\n")
    events = [json.loads(line) for line in llmopt("run", tmp_path / "p.yaml", "--json-lines").out.splitlines()]
    assert [(event.get("step"), event.get("line")) for event in events] == [
        ("eval", "eval: model, block 1/2"), ("eval", "eval: model, block 2/2"), (None, None),
    ]  # fmt: skip


def test_json_lines_end_with_the_error(llmopt: Llmopt, tmp_path: Path) -> None:
    ran = llmopt("quantize", tmp_path / "nothing", "--json-lines")
    event = json.loads(ran.out)
    assert ran.code == 1
    assert (event["event"], event["code"]) == ("error", 1)
    assert ran.err == f"error: {event['message']}\n\nhint: {event['hint']}\n"


def test_json_lines_tell_wrong_usage_too(llmopt: Llmopt) -> None:
    assert json.loads(llmopt("quantize", "--json-lines", "--bts", "4").out)["code"] == 2


@pytest.mark.parametrize("command", ["quantize", "compile", "eval", "run", "bench"])
def test_json_and_json_lines_exclude_each_other(llmopt: Llmopt, command: str) -> None:
    ran = llmopt(command, "x", "--json", "--json-lines")
    assert ran.code == 2
    assert ran.err.startswith("error: `--json` and `--json-lines` cannot both be given\n")


def test_events_come_as_they_happen() -> None:
    """The process waits for us to have read its first event before it makes the second."""
    code = (
        "from llmopt.cli import console\n"
        "c = console.start(as_json=False, as_lines=True, quiet=False, verbose=False)\n"
        "c.progress('first')\n"
        "c.progress(input())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["line"] == "first"
        process.stdin.write("second\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["line"] == "second"


def test_time_left_is_told_from_the_steps_of_this_process(capfd: pytest.CaptureFixture[str]) -> None:
    lines = console.Console(as_lines=True)
    for done, facts in enumerate([{}, {}, {"seconds": 2.0}, {"seconds": 4.0}], start=1):
        lines.progress("x", stage="quantize", done=done, total=10, **facts)
    lines.progress("x", stage="eval", done=1, total=10)
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [event.get("eta_s") for event in events] == [None, None, 14.0, 18.0, None]


def test_within_names_the_part_and_keeps_its_facts(capfd: pytest.CaptureFixture[str]) -> None:
    within(console.Console(as_lines=True).progress, "eval", step="eval")("block", done=1)
    event = json.loads(capfd.readouterr().out)
    assert (event["line"], event["step"], event["done"]) == ("eval: block", "eval", 1)
    silent("nothing", done=1)
    assert capfd.readouterr() == ("", "")


def test_an_error_leaves_the_terminal_as_it_found_it(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "from llmopt.cli import console\n"
        "from llmopt.errors import LlmoptError\n"
        "c = console.start(as_json=False, quiet=False, verbose=False)\n"
        "c.progress('x', stage='quantize', done=1, total=2, block='b')\n"
        "c.error(LlmoptError('broken'))\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], stderr=theirs, check=True, timeout=60, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    sent = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert sent.endswith("error: broken\r\n")
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")  # the cursor is there again
