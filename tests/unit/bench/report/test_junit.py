"""JUnit XML as GitLab and Jenkins read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element, fromstring

from llmopt.bench.report.junit import junit

MakeReport = Callable[..., dict[str, Any]]

#: The children and the attributes that Jenkins' schema has for each element.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"testsuite"}, {"name", "tests", "failures", "errors", "skipped", "time"}),
    "testsuite": (
        {"properties", "testcase"},
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
    ),
    "properties": ({"property"}, set()),
    "property": (set(), {"name", "value"}),
    "testcase": ({"failure", "error", "skipped", "system-out"}, {"classname", "name", "time"}),
    "failure": (set(), {"message", "type"}),
    "error": (set(), {"message", "type"}),
    "skipped": (set(), {"message"}),
    "system-out": (set(), set()),
}


def cases(root: Element, state: str) -> list[str]:
    return [case.attrib["name"] for case in root.iter("testcase") if case.find(state) is not None]


def test_it_is_of_the_schema(make_report: MakeReport) -> None:
    for element in fromstring(junit(make_report())).iter():
        children, attributes = ALLOWED[element.tag]
        assert {child.tag for child in element} <= children
        assert set(element.attrib) <= attributes


def test_the_counts_are_those_of_the_cases(make_report: MakeReport) -> None:
    root = fromstring(junit(make_report()))
    for suite in (root, *root.iter("testsuite")):
        assert int(suite.attrib["tests"]) == len(list(suite.iter("testcase")))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[attribute]) == len(list(suite.iter(tag)))


def test_no_two_cases_share_a_name(make_report: MakeReport) -> None:
    names = [
        (case.attrib["classname"], case.attrib["name"]) for case in fromstring(junit(make_report())).iter("testcase")
    ]
    assert len(names) == len(set(names)) == 8


def test_what_was_broken_fails_with_its_sentence(make_report: MakeReport) -> None:
    root = fromstring(junit(make_report()))
    assert cases(root, "failure") == ["ttft_ms_p99<=200 (candidate at c32)", "TTFT p99 at c32 against the baseline"]
    for failure in root.iter("failure"):
        assert failure.text == failure.attrib["message"]
    assert "1250" in next(root.iter("failure")).attrib["message"]


def test_inconclusive_is_skipped(make_report: MakeReport) -> None:
    assert cases(fromstring(junit(make_report())), "skipped") == ["ITL p99 at c16 against the baseline"]


def test_an_invalid_measurement_is_an_error_and_nothing_passes(make_report: MakeReport) -> None:
    root = fromstring(junit(make_report(valid=False, invalid_because="the client used 99% of a core")))
    assert cases(root, "error") == ["the measurement is valid"]
    assert cases(root, "failure") == cases(root, "system-out") == []
    assert root.attrib["skipped"] == "7"


def test_without_a_gate_there_is_one_case(make_report: MakeReport) -> None:
    root = fromstring(junit(make_report(gate=None)))
    assert [case.attrib["name"] for case in root.iter("testcase")] == ["the measurement is valid"]


def test_what_xml_cannot_hold_is_replaced(make_report: MakeReport) -> None:
    root = fromstring(junit(make_report(valid=False, invalid_because="<&> \x00\x1b[31m\ud800 end")))
    assert "<&> \N{REPLACEMENT CHARACTER}" in next(root.iter("error")).attrib["message"]


def test_a_comparison_that_decides_nothing_does_not_fail(
    make_report: MakeReport, make_gate: Callable[..., Any]
) -> None:
    gate = make_gate("pass") | {"enforced": False, "slo": []}
    root = fromstring(junit(make_report(gate=gate)))
    assert cases(root, "failure") == []
    assert len(cases(root, "skipped")) == 2
