"""A picture of the errors: one line a kind of linear over the blocks, and below it the bits where they differ.

Plain SVG by hand: no plotting library, the same bytes every time, light or dark as the reader's system is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median

from llmopt.quantizers.errors_report import Linear, grouped, labels

_WIDTH, _LEFT, _RIGHT, _TOP = 1000, 72, 236, 92
_LABEL, _CELL = 17, 16  # height of a label, of a row of bits
_DECADES = 4  # shown at most, down from the worst
_MARKS = 1200  # circles with a tooltip, at most
#: Colours of the kinds, on light and on dark; each has a contrast of at least 3 to its ground.
_COLOURS = (
    ("#0969da", "#58a6ff"), ("#c2410c", "#fb923c"), ("#15803d", "#4ade80"), ("#8250df", "#c297ff"),
    ("#bf3989", "#f778ba"), ("#0e7490", "#39c5cf"), ("#946800", "#e3b341"), ("#57606a", "#9ea7b3"),
    ("#cf222e", "#ff7b72"), ("#4d7c0f", "#a3d65c"),
)  # fmt: skip
_DASHES = ("", "7 3", "2 3")  # by the part of the block: attention, feed-forward, ...
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


@dataclass(frozen=True, slots=True)
class _Line:
    """One kind: for each block that has it (by its place on the x axis) its linears, several where it has experts."""

    kind: str
    label: str
    style: int
    dash: str
    points: Mapping[int, Sequence[Linear]]

    def middle(self, place: int) -> float:
        return median(linear.error for linear in self.points[place])

    @property
    def mean(self) -> float:
        return fmean(linear.error for group in self.points.values() for linear in group)

    def runs(self) -> Iterator[list[int]]:
        """Places next to each other: a line is broken where a block has no such linear."""
        run: list[int] = []
        for place in sorted(self.points):
            if run and place != run[-1] + 1:
                yield run
                run = []
            run.append(place)
        yield run


@dataclass(frozen=True, slots=True)
class _Plot:
    """Where things are, in pixels."""

    blocks: Sequence[str]
    low: float
    high: float
    height: float

    @property
    def right(self) -> float:
        return _WIDTH - _RIGHT

    @property
    def bottom(self) -> float:
        return _TOP + self.height

    @property
    def step(self) -> float:
        return (self.right - _LEFT) / len(self.blocks)

    def x(self, place: int) -> float:
        return _LEFT + (place + 0.5) * self.step

    def y(self, error: float) -> float:
        share = math.log(max(error, self.low) / self.low) / math.log(self.high / self.low)
        return self.bottom - share * self.height


def draw(linears: Sequence[Linear], title: str) -> str:
    """The SVG; `linears`, at least one, in the order of their blocks."""
    blocks = list(grouped(linears, "block"))
    lines = list(_lines(linears, blocks))
    low, high = _range([linear.error for linear in linears])
    plot = _Plot(blocks, low, high, max(320.0, _LABEL * (len(lines) + 1.0)))
    mixed = len({linear.bits for linear in linears}) > 1
    height = plot.bottom + 60 + (_CELL * len(lines) + 52 if mixed else 0)
    worst = max(linears, key=lambda linear: linear.error)
    summary = f"mean {fmean(linear.error for linear in linears):.4f}, worst {worst.error:.4f} in {worst.name}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title desc">',
        f'<title id="title">Relative error of each linear: {escape(title)}</title>',
        f'<desc id="desc">{escape(_description(lines, blocks, summary))}</desc>',
        f"<style>{_style(lines)}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height:.0f}"/>',
        f'<text class="title" x="{_LEFT}" y="34">Relative error of each linear</text>',
        f'<text class="dim" x="{_LEFT}" y="56">{escape(title)}</text>',
        f'<text class="dim" x="{_LEFT}" y="76">{escape(summary)}</text>',
        *_axes(plot),
        *(part for line in lines for part in _curve(line, plot, marks=len(linears) <= _MARKS)),
        f'<circle class="ring" cx="{plot.x(blocks.index(worst.block)):.1f}" cy="{plot.y(worst.error):.1f}" r="6"/>',
        *_legend(lines, plot),
        *(_bits(lines, plot) if mixed else ()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lines(linears: Sequence[Linear], blocks: Sequence[str]) -> Iterator[_Line]:
    kinds = grouped(linears, "kind")
    names = labels(kinds)
    place = {block: number for number, block in enumerate(blocks)}
    parents = list(dict.fromkeys(kind.split(".")[0] for kind in kinds))
    for number, (kind, group) in enumerate(kinds.items()):
        points: dict[int, list[Linear]] = {}
        for linear in group:
            points.setdefault(place[linear.block], []).append(linear)
        dash = _DASHES[parents.index(kind.split(".")[0]) % len(_DASHES)]
        yield _Line(kind, names[kind], number % len(_COLOURS), dash, points)


def _range(errors: Iterable[float]) -> tuple[float, float]:
    """Ends of the axis, a little outside of what is there; an error of nothing lies on its lower end."""
    found = [error for error in errors if error > 0 and math.isfinite(error)] or [1e-3]
    high = max(found) * 1.15
    low = max(min(found) / 1.15, high / 10**_DECADES)
    return (low, high) if high / low > 2 else (low / 1.5, high * 1.5)


def _description(lines: Sequence[_Line], blocks: Sequence[str], summary: str) -> str:
    means = "; ".join(f"{line.label} {line.mean:.4f}" for line in lines)
    several = " For experts a line is the median and the band goes from the least to the most."
    return (
        f"Relative error of the outputs on a logarithmic axis, over {len(blocks)} blocks, one line for each kind of "
        f"linear; {summary}. Means: {means}." + (several if any("*" in line.kind for line in lines) else "")
    )


def _style(lines: Sequence[_Line]) -> str:
    """Grounds, text and as many colours as there are kinds, for light and dark."""
    used = sorted({line.style for line in lines})

    def colours(dark: bool) -> str:
        ground, ink, dim, grid = (
            ("#0d1117", "#e6edf3", "#9198a1", "#30363d") if dark else ("#ffffff", "#1f2328", "#59636e", "#d8dee4")
        )
        own = "".join(f".s{n}{{stroke:{_COLOURS[n][dark]}}}.f{n}{{fill:{_COLOURS[n][dark]}}}" for n in used)
        return (
            f".ground{{fill:{ground}}}text{{fill:{ink}}}.dim{{fill:{dim}}}.grid{{stroke:{grid}}}.axis{{stroke:{dim}}}"
            f".ring{{stroke:{ink}}}.bit{{fill:{_COLOURS[0][dark]}}}.mark{{stroke:{ground}}}{own}"
        )

    return (
        f"text{{{_FONT};font-size:12px}}.title{{font-size:18px;font-weight:600}}.end{{text-anchor:end}}"
        ".mid{text-anchor:middle}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.band{fill-opacity:.16}"
        f".ring{{fill:none;stroke-width:1.5}}.lead{{fill:none;stroke-width:1;opacity:.5}}{colours(False)}"
        f"@media (prefers-color-scheme:dark){{{colours(True)}}}"
    )


def _axes(plot: _Plot) -> Iterator[str]:
    for error in _ticks(plot.low, plot.high):
        y = plot.y(error)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{plot.right:.1f}"/>'
        yield f'<text class="dim end" x="{_LEFT - 8}" y="{y + 4:.1f}">{error:g}</text>'
    yield f'<path class="axis" d="M{_LEFT} {plot.bottom:.1f}H{plot.right:.1f}"/>'
    yield from _block_numbers(plot, plot.bottom + 18)
    middle = (_LEFT + plot.right) / 2
    yield f'<text class="dim mid" x="{middle:.1f}" y="{plot.bottom + 38:.1f}">block</text>'
    y = _TOP + plot.height / 2
    yield f'<text class="dim mid" transform="translate(18 {y:.1f}) rotate(-90)">relative error (log scale)</text>'


def _block_numbers(plot: _Plot, y: float) -> Iterator[str]:
    """As many as there is room for; what is no block of a stack (a head) by its name."""
    every = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if n * plot.step >= 26)
    last = [block.split(".")[-1] for block in plot.blocks]
    named = [plot.x(place) for place, text in enumerate(last) if not text.isdigit()]
    for place, text in enumerate(last):
        x = plot.x(place)
        if x in named or (place % every == 0 and all(abs(x - other) > 44 for other in named)):
            yield f'<text class="dim mid" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, or only 1 where that would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step * 10.0**decade:.2g}") for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 9:
            break
    return found


def _curve(line: _Line, plot: _Plot, *, marks: bool) -> Iterator[str]:
    if any(len(group) > 1 for group in line.points.values()):
        yield from _band(line, plot)
    for run in line.runs():
        path = " ".join(f"{plot.x(place):.1f},{plot.y(line.middle(place)):.1f}" for place in run)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        yield f'<polyline class="line s{line.style}"{dash} points="{path}"/>'
    for place, group in line.points.items() if marks else ():
        told = "\n".join(f"{linear.name}: {linear.error:.4f}, {linear.bits} bits" for linear in group)
        x, y, radius = plot.x(place), plot.y(line.middle(place)), 2.6 if plot.step > 16 else 1.8
        yield f'<circle class="f{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        yield f"<title>{escape(told)}</title></circle>"


def _band(line: _Line, plot: _Plot) -> Iterator[str]:
    """From the least to the most of a block's experts."""
    for run in line.runs():
        ends = [sorted(linear.error for linear in line.points[place]) for place in run]
        upper = [f"{plot.x(place):.1f},{plot.y(errors[-1]):.1f}" for place, errors in zip(run, ends, strict=True)]
        lower = [f"{plot.x(place):.1f},{plot.y(errors[0]):.1f}" for place, errors in zip(run, ends, strict=True)]
        yield f'<polygon class="band f{line.style}" points="{" ".join([*upper, *reversed(lower)])}"/>'


def _legend(lines: Sequence[_Line], plot: _Plot) -> Iterator[str]:
    """Each kind beside the end of its line, moved as far as its neighbours need."""
    wanted = sorted((plot.y(line.middle(max(line.points))), number) for number, line in enumerate(lines))
    places = _spread([y for y, _ in wanted], _TOP + 6.0, plot.bottom - 6.0)
    for (end, number), y in zip(wanted, places, strict=True):
        line, x = lines[number], plot.right + 18
        start = plot.x(max(line.points)) + 4
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        yield f'<path class="lead s{line.style}" d="M{start:.1f} {end:.1f}L{x - 2:.1f} {y:.1f}"/>'
        yield f'<path class="line s{line.style}"{dash} d="M{x} {y:.1f}h22"/>'
        label = f'{escape(line.label)} <tspan class="dim">{line.mean:.4f}</tspan>'
        yield f'<text x="{x + 28}" y="{y + 4:.1f}">{label}</text>'
    yield f'<text class="dim" x="{plot.right + 46:.1f}" y="{_TOP - 12}">kind and its mean</text>'


def _spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Ascending positions at least a label apart and within the plot, near those wanted (ascending too)."""
    found: list[float] = []
    for number, y in enumerate(wanted):
        latest = high - (len(wanted) - 1 - number) * _LABEL
        found.append(max(min(y, latest), found[-1] + _LABEL if found else low))
    for number in range(len(found) - 2, -1, -1):  # what was pushed down more than it had to be comes back
        found[number] = max(min(found[number], found[number + 1] - _LABEL), low)
    return found


def _bits(lines: Sequence[_Line], plot: _Plot) -> Iterator[str]:
    """A row of cells a kind, the darker the more bits; the least of a block's experts."""
    top = plot.bottom + 64
    known = sorted({linear.bits for line in lines for group in line.points.values() for linear in group})
    yield f'<text class="dim" x="{_LEFT}" y="{top - 8:.1f}">bits</text>'
    for number, bits in enumerate(known):
        left = _LEFT + 34 + number * 44
        where = f'x="{left}" y="{top - 18:.1f}" width="14" height="12"'
        yield f'<rect class="bit" fill-opacity="{_opacity(bits)}" {where}/>'
        yield f'<text class="dim" x="{left + 18}" y="{top - 8:.1f}">{bits}</text>'
    for number, line in enumerate(lines):
        y = top + number * _CELL
        for place, group in line.points.items():
            bits = min(linear.bits for linear in group)
            x, width = plot.x(place) - plot.step / 2, max(plot.step - 1, 0.5)
            yield (
                f'<rect class="bit" fill-opacity="{_opacity(bits)}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{_CELL - 2}"/>'
            )
        yield f'<text x="{plot.right + 10:.1f}" y="{y + 11:.1f}">{escape(line.label)}</text>'
    yield from _block_numbers(plot, top + len(lines) * _CELL + 14)


def _opacity(bits: int) -> str:
    return f"{min(1.0, max(0.06, (bits - 1.5) / 7)):.2f}"
