"""report.html: complete in itself, and seen by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmopt.bench.client.base import Failure
from llmopt.bench.metrics.figures import Level, LoadShape
from llmopt.bench.report.page import page
from llmopt.bench.report.requests import Requests
from llmopt.bench.report.rows import Rows, read

MakeReport = Callable[..., dict[str, Any]]
MakeLevels = Callable[..., list[Level]]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Structure(HTMLParser):
    """The elements of a page, and whether each was closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows_of(out: Path, levels: list[Level]) -> list[Rows]:
    with Requests(out) as requests:
        for level in levels:
            requests.append(level)
    return read(out)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, make_levels: MakeLevels, make_report: MakeReport) -> str:
    levels = make_levels(streams=(1, 4, 32), rounds=3, requests=24)
    return page(make_report(levels), rows_of(tmp_path_factory.mktemp("full"), levels))


def headings(text: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", text)


def test_a_page_has_all_its_parts(full: str) -> None:
    assert headings(full) == [
        "Key figures", "Objectives and comparison", "What the load costs", "Requests", "Quality and size", "Notes",
        "How it was measured",
    ]  # fmt: skip
    assert full.index("✗</span> Failed") < full.index("<h2>")


def test_its_elements_are_closed(full: str) -> None:
    assert len(Structure(full).tags) > 300


def test_nothing_is_loaded(full: str) -> None:
    found = Structure(full)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in found.tags}
    assert not {"src", "href", "srcset", "xlink:href", "action"} & {key for _, attrs in found.tags for key in attrs}
    assert not re.search(r"url\(|@import|@font-face", full)


def test_every_chart_can_be_read_out(full: str) -> None:
    charts = re.findall("<svg .*?</svg>", full)
    assert len(charts) > 10
    for chart in charts:
        assert 'role="img"' in chart
        assert re.search("<title>[^<]+</title><desc>[^<]+</desc>", chart)


def test_what_comes_from_outside_is_text(make_report: MakeReport, make_levels: MakeLevels, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'"
    levels = [replace(level, subject=evil) for level in make_levels(streams=(4,), rounds=2, requests=8)]
    report = make_report(levels, notes=[evil], invalid_because=evil, valid=False)
    report["subjects"] = {evil: report["subjects"]["candidate"] | {"model": evil, "url": evil}}
    report["subjects"][evil]["lineage"][0] |= {"op": evil, "id": evil, "source": evil, "license": evil}
    report["settings"][evil] = evil
    report["environment"]["cpu"] = evil
    report["gate"]["comparisons"][0] |= {"reason": evil, "metric": evil, "level": evil}
    report["gate"]["slo"][0] |= {"slo": evil}
    text = page(report, rows_of(tmp_path, levels))
    assert "<script" not in text
    assert {tag for tag, _ in Structure(text).tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "p", "span", "h1", "h2", "h3", "b",
        "section", "dl", "div", "dt", "dd", "small", "table", "thead", "tbody", "tr", "th", "td", "figure", "svg",
        "figcaption",
        "desc", "path", "text", "polyline", "circle", "rect", "ul", "li", "br", "details", "summary", "i", "code",
    }  # fmt: skip


def test_a_large_run_is_a_small_page(tmp_path: Path, make_levels: MakeLevels, make_report: MakeReport) -> None:
    levels = make_levels(streams=(1, 2, 4, 8, 16, 32, 64), rounds=1, requests=500)
    text = page(make_report(levels), rows_of(tmp_path, levels))
    assert len(text.encode()) < 300_000
    assert "The 6 most loaded of 7 levels are drawn" in text


def test_a_run_without_requests_or_gate_has_fewer_parts(make_report: MakeReport) -> None:
    report = make_report(gate=None, notes=[])
    report["subjects"] = {"candidate": {"model": "m", "url": "http://127.0.0.1:1"}}
    report["results"] = {"candidate": {"c1": report["results"]["candidate"]["c1"]}}
    assert headings(page(report, [])) == ["Key figures", "What the load costs", "How it was measured"]


def test_nothing_measured_says_why(make_report: MakeReport) -> None:
    text = page(make_report([], valid=False, invalid_because="interrupted", gate=None, notes=[]), [])
    Structure(text)
    assert "Not valid" in text
    assert "Key figures" not in text
    assert "interrupted" in text


def test_an_open_loop_shows_what_was_late(tmp_path: Path, make_levels: MakeLevels, make_report: MakeReport) -> None:
    (level, *_) = make_levels(streams=(4,), rounds=1, requests=24)
    records = [replace(record, due_ns=record.sent_ns - 40_000_000) for record in level.records]
    late = replace(level, records=records, load=LoadShape(rate=9.0, label="r9"))
    text = page(make_report([late], gate=None), rows_of(tmp_path, [late]))
    assert 'class="bar b-queued"' in text
    assert "Time to first token, from its schedule" in text
    assert "scheduled TTFT p99" in text


def test_one_wide_interval_does_not_hide_the_others(make_report: MakeReport, make_gate: Callable[..., Any]) -> None:
    gate = make_gate()
    gate["comparisons"][2] |= {"ratio": 1.6, "low": 0.9, "high": 6.0}
    (forest,) = re.findall("Candidate against baseline</figcaption>(.*?)</svg>", page(make_report(gate=gate), []))
    margins = [float(x) for x in re.findall(r'class="limit" d="M([\d.]+)', forest)]
    equal = [float(x) for x in re.findall(r'class="axis" d="M([\d.]+)', forest)]
    assert margins[0] - equal[0] > 20  # pixels
    assert forest.count("l6 5l-6 5") == 1  # an arrow where it goes on


def test_a_digest_is_no_title(make_report: MakeReport) -> None:
    report = make_report()
    report["subjects"]["candidate"]["model"] = "0123456789abcdef" * 4
    assert "<b>candidate</b> (0123456789ab)" in page(report, [])


def test_a_sweep_marks_what_it_found(make_report: MakeReport) -> None:
    point = make_report()["results"]["candidate"]["c4"]["rounds"][0]
    sweep = {"kind": "streams", "knee": 4.0, "best": 24.0, "at_limit": True, "stopped": "`most` was reached"}
    text = page(make_report(sweep=sweep | {"points": [point | {"load": 24.0, "tokens_per_s": 720.0}]}), [])
    assert "Knee: 4 streams. Best: 24 streams; a larger load may do as well" in text
    assert re.search(r'class="label"[^>]*>c4 knee<', text)
    assert re.search(r'class="label"[^>]*>c24 best<', text)  # though no load of it is among the results


def test_rows_of_another_tool_are_drawn_without_a_timeline(tmp_path: Path, make_report: MakeReport) -> None:
    row = {"subject": "candidate", "level": "c4", "round": 0, "first_us": 30_000, "chunks_us": [30_000, 40_000, 51_000]}
    with Requests(tmp_path) as requests:
        requests.append_rows([row] * 12)
    text = page(make_report(gate=None), read(tmp_path))
    assert "Gaps between chunks" in text
    assert "requests drawn" not in text
    assert 'class="bar' not in text


def test_what_was_cut_does_not_look_decoded(tmp_path: Path, make_levels: MakeLevels, make_report: MakeReport) -> None:
    (level, *_) = make_levels(streams=(4,), rounds=1, requests=8)
    cut = replace(level, records=[replace(record, failure=Failure("cut", "")) for record in level.records])
    text = page(make_report([cut], gate=None), rows_of(tmp_path, [cut]))
    assert 'class="bar b-failed"' in text
    assert 'class="bar b-decode"' not in text


def test_only_failures_are_drawn_too(tmp_path: Path, make_levels: MakeLevels, make_report: MakeReport) -> None:
    (level, *_) = make_levels(streams=(4,), rounds=1, requests=8)
    gone = Failure("refused", "connection refused")
    records = [replace(r, failure=gone, stamps_ns=(), answer_ns=None, completion_tokens=None) for r in level.records]
    failed = replace(level, records=records)
    text = page(
        make_report([failed], gate=None, valid=False, invalid_because="all failed"), rows_of(tmp_path, [failed])
    )
    Structure(text)
    assert 'class="bar b-failed"' in text
    assert "in a measurement that is not valid" in text


def browse(file: Path, *flags: str) -> str:
    """What Chromium says, with a profile of its own."""
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, profile, *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # what a page is refused, or does wrong, is said there
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("scheme", "size"), [("light", "1200,2400"), ("dark", "390,2400")])
def test_a_browser_draws_it(tmp_path: Path, full: str, scheme: str, size: str) -> None:
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(full, encoding="utf-8")
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    dom = browse(file, f"--window-size={size}", f"--screenshot={shot}", "--dump-dom", *dark)
    for heading in headings(full):
        assert f"<h2>{heading}</h2>" in dom
    assert different_rows(shot) > 600  # of pixels; one that stayed blank has two


def different_rows(png: Path) -> int:
    """How many rows of a picture are not the same as another: the bytes as they are, without undoing PNG's filters."""
    data, place, packed, width = png.read_bytes(), 8, b"", 0
    while place < len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        chunk = data[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width = int.from_bytes(chunk[:4]) * {2: 3, 6: 4}[chunk[9]] + 1
        packed += chunk if kind == b"IDAT" else b""
        place += 12 + size
    rows = zlib.decompress(packed)
    return len({rows[start : start + width] for start in range(0, len(rows), width)})
