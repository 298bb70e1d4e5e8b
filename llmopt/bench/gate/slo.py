"""Thresholds: `ttft_p99_ms<=200` holds a level's figure, `ttft_ms<=200` holds each request and so defines goodput."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from llmopt.artifacts.outcome import Json
from llmopt.bench.gate.names import SHARES, TIMES, better, forms, joined, split
from llmopt.errors import SettingsError

Operator = Literal["<=", ">=", "<", ">"]

_FORM = re.compile(r"\s*(?P<name>[\w.]+)\s*(?P<op><=|>=|<|>)\s*(?P<limit>[-+\d.eE]+)\s*(?P<unit>ms|s|%)?\s*")
_HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_SHORT = {"goodput": "goodput_share", "error_rate": "error_share"}
_OPERATORS: dict[str, Operator] = {"<=": "<=", ">=": ">=", "<": "<", ">": ">"}
_EXAMPLES = "write `ttft_ms_p99<=200`, `tokens_per_s>=100`, `errors<=0` or `goodput>=95%`"
_IMPLIED_GOODPUT = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """One threshold; `limit` in the metric's own unit, a share between 0 and 1."""

    metric: str
    percentile: str | None
    op: Operator
    limit: float

    @property
    def figure(self) -> str:
        """Its name in a report's compact figures."""
        return joined(self.metric, self.percentile)

    @property
    def of_each_request(self) -> bool:
        return self.metric in TIMES and self.percentile is None

    def met_by(self, value: float) -> bool:
        return bool(_HOLDS[self.op](value, self.limit))

    def __str__(self) -> str:
        return f"{self.figure}{self.op}{self.limit:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A threshold beside the figure; `value` None: the report has no such figure, which does not meet anything.

    `figure` is the one that was held against it: of an open loop the time since a request was due.
    """

    slo: Slo
    figure: str
    value: float | None
    met: bool

    def to_json(self) -> dict[str, Json]:
        return {"slo": str(self.slo), "figure": self.figure, "value": self.value, "met": self.met}


def parse(text: str) -> Slo:
    """The threshold that `text` writes; a `SettingsError` says what is wrong with it."""
    form = _FORM.fullmatch(text)
    if form is None:
        raise SettingsError(f"`{text}` is not a threshold", hint=_EXAMPLES)
    name = form["name"].lower()
    if name == "errors" and form["unit"] == "%":
        name = "error_share"
    metric, percentile = split(_SHORT.get(name, name))
    limit = _in_unit(text, metric, form["limit"], form["unit"])
    op = _OPERATORS[form["op"]]
    upper = better(joined(metric, percentile)) == "lower"
    if upper != (op in ("<=", "<")):
        turned = op.translate(str.maketrans("<>", "><"))
        raise SettingsError(
            f"`{text}` would fail what is good: `{metric}` is better {'low' if upper else 'high'}",
            hint=f"write `{text.replace(op, turned, 1)}`",
        )
    return Slo(metric=metric, percentile=percentile, op=op, limit=limit)


def parse_all(texts: Iterable[str]) -> tuple[Slo, ...]:
    """Every threshold; limits of each request imply that 99 % of the requests meet them, unless goodput is given."""
    slos = tuple(parse(text) for text in texts)
    if per_request(slos) and not any(slo.metric.startswith("goodput") for slo in slos):
        return (*slos, Slo(metric="goodput_share", percentile=None, op=">=", limit=_IMPLIED_GOODPUT))
    return slos


def per_request(slos: Iterable[Slo]) -> dict[str, float]:
    """The milliseconds that a request may take to count as goodput; of two limits the stricter."""
    limits: dict[str, float] = {}
    for slo in slos:
        if slo.of_each_request:
            limits[slo.metric] = min(slo.limit, limits.get(slo.metric, slo.limit))
    return limits


def check(slos: Iterable[Slo], figures: Mapping[str, Json]) -> list[Checked]:
    """Each threshold of a level against its compact figures."""
    found = []
    for slo in slos:
        if not slo.of_each_request:
            figure = next((form for form in forms(slo.figure) if figures.get(form) is not None), slo.figure)
            value = _value(figure, figures)
            found.append(Checked(slo=slo, figure=figure, value=value, met=value is not None and slo.met_by(value)))
    return found


def broken(slos: Iterable[Slo], figures: Mapping[str, Json]) -> list[Checked]:
    """Those that the figures do not meet."""
    return [checked for checked in check(slos, figures) if not checked.met]


def _value(figure: str, figures: Mapping[str, Json]) -> float | None:
    value = figures.get(figure)
    if figure == "error_share" and value is None:
        errors, requests = figures.get("errors"), figures.get("requests")
        if isinstance(errors, int) and isinstance(requests, int) and requests:
            return errors / requests
    return float(value) if isinstance(value, int | float) else None


def _in_unit(text: str, metric: str, number: str, unit: str | None) -> float:
    """The limit in the metric's own unit: milliseconds, a share of 1, or as written."""
    try:
        limit = float(number)
    except ValueError:
        raise SettingsError(f"`{text}` has no number to hold", hint=_EXAMPLES) from None
    share = metric in SHARES
    units = ("%",) if share else ("ms", "s") if metric in TIMES else ()
    if unit is not None and unit not in units:
        raise SettingsError(f"`{text}`: `{metric}` is not measured in `{unit}`", hint=_EXAMPLES)
    limit = limit * 1000 if unit == "s" else limit / 100 if unit == "%" else limit
    if limit < 0 or (share and limit > 1):
        top = " to 1 (or 0 % to 100 %)" if share else ""
        raise SettingsError(f"`{text}`: no `{metric}` can be `{number}`", hint=f"give a number from 0{top}")
    return limit
