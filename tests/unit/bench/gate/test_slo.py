from __future__ import annotations

import pytest

from llmopt.bench.gate import slo
from llmopt.bench.gate.names import GATED, better, joined, least_requests, names, split
from llmopt.errors import SettingsError


@pytest.mark.parametrize("text", ["ttft_p99_ms<=200", "ttft_ms_p99<=200", " ttft_p99 <= 200ms ", "TTFT_ms_p99<=0.2s"])
def test_every_way_to_write_it_is_the_same_threshold(text: str) -> None:
    assert slo.parse(text) == slo.Slo(metric="ttft_ms", percentile="p99", op="<=", limit=200.0)


@pytest.mark.parametrize("text", ["goodput>=95%", "goodput_share>=0.95", "goodput >= 95 %"])
def test_a_share_may_be_written_in_percent(text: str) -> None:
    assert slo.parse(text) == slo.Slo(metric="goodput_share", percentile=None, op=">=", limit=0.95)


def test_errors_in_percent_are_a_share_of_the_requests() -> None:
    (checked,) = slo.check([slo.parse("errors<=1%")], {"errors": 3, "requests": 200})
    assert (checked.value, checked.met) == (0.015, False)


@pytest.mark.parametrize("figure", names())
def test_every_figure_can_be_a_threshold_and_is_written_as_it_is_read(figure: str) -> None:
    text = f"{figure}{'<=' if better(figure) == 'lower' else '>='}1"
    assert str(slo.parse(text)) == text
    assert joined(*split(figure)) == figure


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("ttft_ms_p99", "ttft_ms_p99<=200"),
        ("", "ttft_ms_p99<=200"),
        ("ttft_ms_p99=200", "ttft_ms_p99<=200"),
        ("tfft_ms_p99<=200", "`ttft_ms_p99`"),
        ("token_per_s>=10", "`tokens_per_s`"),
        ("ttft_ms_p98<=200", "`p99`"),
        ("tokens_per_s_p99>=3", "did you mean"),
        ("tokens_per_s<=10", "`tokens_per_s>=10`"),
        ("ttft_ms_p99>200", "`ttft_ms_p99<200`"),
        ("goodput>=95", "0 % to 100 %"),
        ("ttft_ms_p99<=5%", "write"),
        ("tokens_per_s>=5ms", "write"),
        ("ttft_ms_p99<=-5", "from 0"),
        ("ttft_ms_p99<=1.2.3", "write"),
    ],
)
def test_what_cannot_be_a_threshold_is_an_error_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(SettingsError) as raised:
        slo.parse(text)
    assert raised.value.hint is not None
    assert hint in raised.value.hint


def test_a_figure_at_its_limit_meets_it_unless_it_has_to_be_below() -> None:
    figures = {"ttft_ms_p99": 200.0}
    assert not slo.broken([slo.parse("ttft_ms_p99<=200")], figures)
    assert slo.broken([slo.parse("ttft_ms_p99<200")], figures)


def test_a_figure_that_the_report_lacks_meets_nothing() -> None:
    (checked,) = slo.broken([slo.parse("ttft_ms_p99<=200")], {"ttft_ms_p99": None})
    assert checked.to_json() == {"slo": "ttft_ms_p99<=200", "figure": "ttft_ms_p99", "value": None, "met": False}


def test_a_limit_of_each_request_defines_goodput_and_asks_99_percent_of_it() -> None:
    slos = slo.parse_all(["ttft_ms<=200", "e2e<=2s", "tokens_per_s>=5"])
    assert slo.per_request(slos) == {"ttft_ms": 200.0, "e2e_ms": 2000.0}
    figures = {"goodput_share": 0.98, "tokens_per_s": 6.0}
    assert [str(checked.slo) for checked in slo.broken(slos, figures)] == ["goodput_share>=0.99"]


@pytest.mark.parametrize("given", ["goodput>=90%", "goodput_per_s>=3"])
def test_a_goodput_that_is_given_is_the_one_that_counts(given: str) -> None:
    slos = slo.parse_all(["ttft_ms<=200", given])
    assert [one.metric for one in slos if one.metric.startswith("goodput")] == [slo.parse(given).metric]


def test_of_two_limits_of_a_request_the_stricter_counts() -> None:
    assert slo.per_request(slo.parse_all(["ttft_ms<=200", "ttft_ms<=100"])) == {"ttft_ms": 100.0}


@pytest.mark.parametrize(("figure", "least"), [("ttft_ms_p99", 1000), ("itl_ms_p99.9", 10_000), ("ttft_ms_p50", 20)])
def test_a_percentile_far_out_needs_many_requests(figure: str, least: int) -> None:
    assert least_requests(figure) == least


def test_the_figures_compared_by_default_exist() -> None:
    assert set(GATED) <= set(names())


def test_a_latency_counts_from_the_schedule_where_there_is_one() -> None:
    closed, open_loop = {"ttft_ms_p99": 10.0}, {"ttft_ms_p99": 10.0, "ttft_scheduled_ms_p99": 900.0}
    slos = slo.parse_all(["ttft_p99_ms<=200"])
    assert [slo.check(slos, figures)[0].met for figures in (closed, open_loop)] == [True, False]
