"""JUnit XML: a test case for the measurement itself, for each objective, and for each comparison with the baseline.

How GitLab and Jenkins show it decides the form. GitLab calls `classname` the suite, drops a case whose name it has
seen, and shows the text of a failure and not its `message`; Jenkins shows both. So names are unique, and the sentence
is in both places. What was not met is a `failure`. A measurement that is not valid is an `error`, for the tests could
not be carried out, and the cases that rest on it are `skipped`. An inconclusive comparison is `skipped` too: both show
it apart from the passed, and neither as a regression; exit code 7 is there for a job that shall fail on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from llmopt.bench.report.words import Check, Report, checks

_GROUPS = {"validity": "llmopt.bench.validity", "slo": "llmopt.bench.slo", "gate": "llmopt.bench.gate"}
#: What XML 1.0 cannot hold, in any form.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    found = checks(report)
    started = str(report["environment"].get("started", "")).partition("+")[0]
    wall_s = sum(summary.get("wall_s") or 0.0 for at in report["results"].values() for summary in at.values())
    root = Element("testsuites", {"name": "llmopt bench", **_counts(found, report), "time": f"{wall_s:.3f}"})
    for group, name in _GROUPS.items():
        part = [check for check in found if check.group == group]
        if part:
            time = f"{wall_s if group == 'validity' else 0:.3f}"
            about = {"name": name, **_counts(part, report), "time": time, "timestamp": started}
            suite = SubElement(root, "testsuite", about)
            if group == "validity":
                _properties(suite, report)
            for check in part:
                _case(suite, name, check, time if group == "validity" else "0.000", valid=bool(report["valid"]))
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _state(check: Check, *, valid: bool) -> str | None:
    """The element that a case holds; None where it passed."""
    if (check.group != "validity" and not valid) or (check.outcome != "passed" and not check.decides):
        return "skipped"
    return {"passed": None, "failed": "failure", "inconclusive": "skipped", "invalid": "error"}[check.outcome]


def _case(suite: Element, classname: str, check: Check, time: str, *, valid: bool) -> None:
    case = SubElement(suite, "testcase", classname=classname, name=_text(check.name), time=time)
    state = _state(check, valid=valid)
    sentence = _text(check.sentence)
    if state == "skipped":
        first = "the measurement is not valid; " if not valid else "" if check.decides else "decides nothing; "
        why = first + sentence
        SubElement(case, "skipped", message=why)
    elif state is not None:
        SubElement(case, state, message=sentence, type=check.outcome).text = sentence
    else:
        SubElement(case, "system-out").text = sentence


def _counts(found: Sequence[Check], report: Report) -> Mapping[str, str]:
    states = [_state(check, valid=bool(report["valid"])) for check in found]
    names = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    return {"tests": str(len(found)), **{name: str(states.count(state)) for name, state in names.items()}}


def _properties(suite: Element, report: Report) -> None:
    """What Jenkins shows beside the suite: the subjects, and the margin of the gate."""
    properties = SubElement(suite, "properties")
    for name, subject in report["subjects"].items():
        for key in ("model", "url", "engine", "artifact"):
            if subject.get(key):
                SubElement(properties, "property", name=f"{name}.{key}", value=_text(str(subject[key])))
    for key in ("margin", "alpha"):
        if (report.get("gate") or {}).get(key) is not None:
            SubElement(properties, "property", name=f"gate.{key}", value=f"{report['gate'][key]:g}")


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
