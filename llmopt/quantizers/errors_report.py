"""How far each linear's outputs are off: errors.json for machines, errors.md to read, errors.svg to look at.

Imports nothing heavy. The three are part of the artifact, so their bytes depend on nothing but the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from llmopt.artifacts.outcome import Json
from llmopt.formats.scheme import Scheme

FILE = "errors.json"
#: "model.layers.3" and "mlp.up_proj": a name is cut after its first number.
_IN_A_BLOCK = re.compile(r"(.*?\.(\d+))\.(.+)")
_NOTE = (
    "The relative error of a linear is the size of what quantization changes in its outputs on the calibration inputs, "
    "as a share of those outputs; of its weight, where there are no calibration inputs. Bold is the worst of each kind."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One quantized linear. `kind` is what it is called in every block: "mlp.experts.*.up_proj"."""

    name: str
    block: str
    number: int | None  # of the block; None outside of all blocks, as a head is
    kind: str
    error: float
    bits: int

    @property
    def within(self) -> str:
        """Its name within its block."""
        return self.name.removeprefix(self.block + ".")

    @classmethod
    def of(cls, name: str, error: float, scheme: Scheme | None) -> Linear:
        found = _IN_A_BLOCK.fullmatch(name)
        block, number, within = (found[1], int(found[2]), found[3]) if found else (name, None, name)
        return cls(
            name=name,
            block=block,
            number=number,
            kind=re.sub(r"(?<=\.)\d+(?=\.)", "*", within),
            error=float(f"{error:.6g}"),
            bits=16 if scheme is None else scheme.bits,
        )


def write(out: Path, errors: Mapping[str, float], schemes: Mapping[str, Scheme | None], *, method: str) -> None:
    """Write errors.json, errors.md and errors.svg to `out`.

    `errors` maps each quantized linear's full name to its relative error, in the order of the columns; blocks are put
    in the order of their numbers. `schemes` says how each of them is quantized. Without any linear nothing is written.
    """
    from llmopt.quantizers import errors_chart

    linears = sorted(
        (Linear.of(name, error, schemes.get(name)) for name, error in errors.items()),
        key=lambda linear: (linear.number is None, linear.number or 0),
    )
    if not linears:
        return
    title = f"{method}, {describe([scheme for name in errors if (scheme := schemes.get(name)) is not None])}"
    _write(out / FILE, '{"blocks": [\n' + ",\n".join(json.dumps(each) for each in blocks(linears)) + "\n]}\n")
    _write(out / "errors.md", to_markdown(linears, title))
    _write(out / "errors.svg", errors_chart.draw(linears, title))


def describe(schemes: Sequence[Scheme]) -> str:
    """`4 bits, groups of 128` or, where they differ, `3 to 8 bits, groups of 32 or 128`."""
    bits = sorted({scheme.bits for scheme in schemes})
    sizes = sorted({scheme.group_size for scheme in schemes})
    parts = [f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"] if bits else []
    if groups := [str(size) for size in sizes if size > 0]:
        parts.append(f"groups of {' or '.join(groups)}")
    parts += [words for size, words in ((-1, "a scale a row"), (0, "a scale a tensor")) if size in sizes]
    if any(scheme.activations != "none" for scheme in schemes):
        parts.append("activations too")
    return ", ".join(parts)


def blocks(linears: Iterable[Linear]) -> Iterator[dict[str, Json]]:
    """What errors.json holds under `blocks`: of each its name, and the error and the bits of each of its linears."""
    for block, group in grouped(linears, "block").items():
        yield {
            "block": block,
            "errors": {linear.within: linear.error for linear in group},
            "bits": {linear.within: linear.bits for linear in group},
        }


def worst(written: Mapping[str, Any], count: int) -> list[dict[str, Json]]:
    """The worst linears of an errors.json by their full names: `linear`, `error`, `bits`."""
    found: list[dict[str, Any]] = [
        {
            "linear": name if name == block["block"] else f"{block['block']}.{name}",
            "error": error,
            "bits": block["bits"][name],
        }
        for block in written["blocks"]
        for name, error in block["errors"].items()
    ]
    return sorted(found, key=lambda each: -each["error"])[:count]


def to_markdown(linears: Sequence[Linear], title: str) -> str:
    """A table of blocks by kinds, the worst of each kind in bold, and one of bits where they differ."""
    inside = [linear for linear in linears if linear.number is not None]
    several = any("*" in linear.kind for linear in inside)
    mixed = len({linear.bits for linear in linears}) > 1
    worst = max(linears, key=lambda linear: linear.error)
    mean = fmean(linear.error for linear in linears)
    lines = ["# Error of each linear", "", f"{title}. Mean {mean:.4f}, worst {worst.error:.4f} in `{worst.name}`.", ""]
    lines += [_NOTE + (" Of a block's experts: the median (least to most)." if several else ""), ""]
    lines += _table(inside, _errors, means=True)
    lines += [f"`{linear.name}`: {linear.error:.4f}" for linear in linears if linear.number is None]
    if mixed:
        lines += ["", "## Bits", "", *_table(inside, _bits)]
        lines += [f"`{linear.name}`: {linear.bits}" for linear in linears if linear.number is None]
    return "\n".join([*lines, ""])


def labels(kinds: Iterable[str]) -> dict[str, str]:
    """The short name of each kind: its last part, `experts.*.up_proj`; the whole where that is not enough."""
    known = list(kinds)
    short = {kind: ".".join(kind.split(".")[-3 if "*" in kind else -1 :]) for kind in known}
    found = list(short.values())
    return {kind: short[kind] if found.count(short[kind]) == 1 else kind for kind in known}


def grouped(linears: Iterable[Linear], attribute: Literal["block", "kind"]) -> dict[str, list[Linear]]:
    """Linears by their block or kind, in the order in which these come up."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(getattr(linear, attribute), []).append(linear)
    return groups


def _table(
    linears: Sequence[Linear], cell: Callable[[Sequence[Linear], float], str], *, means: bool = False
) -> list[str]:
    """`cell` gets the linears of a block and kind, and the worst error of that kind."""
    if not linears:
        return []
    kinds, blocks = grouped(linears, "kind"), grouped(linears, "block")
    worst = {kind: max(linear.error for linear in group) for kind, group in kinds.items()}
    lines = [_row(["block", *labels(kinds).values()]), _row(["---", *("---:" for _ in kinds)])]
    for block, group in blocks.items():
        found = grouped(group, "kind")
        cells = (cell(found[kind], worst[kind]) if kind in found else "" for kind in kinds)
        lines.append(_row([block, *cells]))
    if means:
        lines.append(_row(["mean", *(f"{fmean(linear.error for linear in group):.4f}" for group in kinds.values())]))
    return [*lines, ""]


def _errors(group: Sequence[Linear], worst: float) -> str:
    errors = [linear.error for linear in group]
    low, high = f"{min(errors):.4f}", f"{max(errors):.4f}"
    marked = f"**{high}**" if max(errors) == worst else high
    return marked if len(errors) == 1 else f"{median(errors):.4f} ({low} to {marked})"


def _bits(group: Sequence[Linear], worst: float) -> str:
    low, high = min(linear.bits for linear in group), max(linear.bits for linear in group)
    return f"{low}" if low == high else f"{low} to {high}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
