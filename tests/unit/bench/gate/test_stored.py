from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmopt.bench.gate.stored import against_report
from llmopt.errors import LlmoptError, MeasurementInvalidError


def report(
    scale: float = 1.0, *, seed: int = 0, noise: float = 0.02, rounds: int = 12, label: str = "c4", **fields: Any
) -> dict[str, Any]:
    """A report of one subject, whose times are `scale` of the usual, with rounds or (0) without."""
    rng = np.random.default_rng(seed)
    times = [100 * scale * float(np.exp(rng.normal(0, noise))) for _ in range(max(rounds, 1))]
    middle = float(np.median(times))
    summary: dict[str, Any] = {
        "ttft_ms": {"count": 400, "min": middle * 0.9, "p50": middle, "p90": middle * 1.1, "max": middle * 1.5},
        "tokens_per_s": 1e4 / middle,
    }
    if rounds:
        summary["rounds"] = [{"ttft_ms_p50": time, "tokens_per_s": 1e4 / time} for time in times]
    return {"valid": True, "results": {"candidate": {label: summary}}, **fields}


def test_a_run_much_slower_fails_and_the_same_passes() -> None:
    assert against_report(report(1.5), report(seed=1)).verdict == "fail"
    assert against_report(report(1.0), report(seed=1)).verdict == "pass"


def test_the_margin_grows_with_the_noise_of_either_run() -> None:
    def margin(ours: float, theirs: float) -> float:
        found = against_report(report(noise=ours), report(noise=theirs, seed=1), metrics=["ttft_ms_p50"])
        return found.comparisons[0].margin

    assert 0.05 < margin(0.02, 0.02) < margin(0.1, 0.02)
    assert margin(0.02, 0.02) < margin(0.02, 0.1)


def test_a_whole_run_that_was_in_a_bad_mood_rarely_fails() -> None:
    """The mood of a run is as large as its rounds vary, and stays for all of them."""
    rng = np.random.default_rng(0)
    moods = np.exp(rng.normal(0, 0.1, (100, 2)))
    verdicts = [
        against_report(report(ours, noise=0.1, seed=i), report(theirs, noise=0.1, seed=i + 1000)).verdict
        for i, (ours, theirs) in enumerate(moods)
    ]
    assert verdicts.count("fail") <= 5


def test_without_rounds_the_margin_is_widened_by_what_the_run_knows_of_itself_and_it_says_so() -> None:
    found = against_report(report(rounds=0), report(rounds=0, seed=1), metrics=["ttft_ms_p50"])
    assert found.comparisons[0].margin > 0.05
    assert "single run" in found.notes[0]


def test_a_rate_of_single_runs_is_not_judged() -> None:
    found = against_report(report(1.5, rounds=0), report(rounds=0), metrics=["tokens_per_s"])
    assert found.verdict == "inconclusive"
    assert "rounds" in found.reason


def test_swapping_the_reports_turns_the_ratio_over() -> None:
    there, back = against_report(report(1.1), report(seed=1)), against_report(report(seed=1), report(1.1))
    for one, other in zip(there.comparisons, back.comparisons, strict=True):
        assert one.ratio is not None
        assert other.ratio is not None
        assert one.ratio == pytest.approx(1 / other.ratio)


def test_other_machines_and_workloads_are_told() -> None:
    ours = report(settings={"output_tokens": 64}, environment={"cpu": "one", "cores": 2})
    theirs = report(settings={"output_tokens": 128}, environment={"cpu": "two", "cores": 2})
    notes = against_report(ours, theirs).notes[1:]
    assert len(notes) == 2
    assert "output_tokens `128`, not `64`" in notes[0]
    assert "cpu `two`, not `one`" in notes[1]


def test_only_levels_of_both_are_judged() -> None:
    ours = report()
    ours["results"]["candidate"]["c8"] = ours["results"]["candidate"]["c4"]
    assert {comparison.level for comparison in against_report(ours, report(seed=1)).comparisons} == {"c4"}


def test_of_several_subjects_the_candidate_counts() -> None:
    theirs = report()
    theirs["results"] = {"baseline": report(5.0)["results"]["candidate"], **theirs["results"]}
    assert against_report(report(seed=1), theirs).verdict == "pass"


@pytest.mark.parametrize("side", [0, 1])
def test_a_report_that_is_not_valid_never_passes(side: int) -> None:
    reports = [report(), report()]
    reports[side] |= {"valid": False, "invalid_because": "the client could not hold the load"}
    with pytest.raises(MeasurementInvalidError, match="could not hold"):
        against_report(*reports)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (report(label="c64"), "share no level"),
        ({"valid": True, "results": {}}, "no results"),
        ({"results": {"a": {}, "b": {}}}, "several subjects"),
        ({"results": {"a": {"c4": {}}}}, "share no figure"),
    ],
)
def test_reports_that_cannot_be_compared_are_an_error(theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmoptError, match=message):
        against_report(report(), theirs)


def test_a_figure_that_one_lacks_is_an_error_when_asked_for() -> None:
    with pytest.raises(LlmoptError, match="itl_ms_p50"):
        against_report(report(), report(), metrics=["itl_ms_p50"])
