"""Bits where they count: one scheme for each group of linears, the whole within a size and with the least predicted KL.

A multiple-choice knapsack, solved exactly in whole numbers: dynamic programming over (size, cost), in which a state is
dropped when another is no larger and no worse, or when even the Lagrangian bound of what may follow is worse than a
choice already known (Kellerer, Pferschy, Pisinger: Knapsack Problems, chapter 11). No torch and no numpy here.

What counts as size is all that a format stores for the quantized linears (codes, scales, zero points, shapes); bits per
weight are these bits over the weights of the same linears. Embedding, norms, and what is left out by settings, the
head for one, count on neither side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ldexp, prod
from typing import TYPE_CHECKING

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError
from llmopt.formats.scheme import FORMATS, Scheme, is_held

if TYPE_CHECKING:
    from llmopt.formats.base import Layout
    from llmopt.models.config import DecoderConfig
    from llmopt.quantizers.settings import QuantizeSettings

_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I8": 8, "U8": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to store a group of linears. scheme: None for plain weights. cost: predicted KL, in nats a token."""

    scheme: Scheme | None
    cost: float
    size_bits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen: `options` by group, `groups` with each group's linears, `weights` that all of them hold."""

    options: Mapping[str, Option]
    groups: Mapping[str, Sequence[str]]
    weights: int

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """By linear."""
        return {linear: self.options[group].scheme for group, linears in self.groups.items() for linear in linears}

    @property
    def bpw(self) -> float:
        return sum(option.size_bits for option in self.options.values()) / self.weights

    @property
    def predicted_kl(self) -> float:
        """Nats a token, if the groups' errors add up."""
        return sum(option.cost for option in self.options.values())

    def to_json(self) -> dict[str, Json]:
        """For the manifest: what was reached, and the label of each group's scheme."""
        chosen: dict[str, Json] = {group: label(option.scheme) for group, option in self.options.items()}
        return {"bpw": round(self.bpw, 4), "predicted_kl": float(f"{self.predicted_kl:.4g}"), "schemes": chosen}

    def markdown(self) -> str:
        """A table with a row a block and a column a site."""
        table: dict[str, dict[str, str]] = {}
        for group, option in self.options.items():
            block, _, site = group.rpartition(".")
            table.setdefault(block or site, {})[site] = label(option.scheme)
        sites = list(dict.fromkeys(site for row in table.values() for site in row))
        lines = [["block", *sites], ["---"] * (len(sites) + 1)]
        lines += [[block, *(row.get(site, "") for site in sites)] for block, row in table.items()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(scheme: Scheme | None) -> str:
    """A scheme in a word: "W4 g128", "W4 g128 asym", "plain"."""
    if scheme is None:
        return "plain"
    group = "" if scheme.group_size == -1 else f" g{scheme.group_size}"
    return f"W{scheme.bits}{group}{'' if scheme.symmetric else ' asym'}"


def candidates(scheme: Scheme, format_name: str, some: Sequence[int] = ()) -> list[Scheme | None]:
    """`scheme` at every number of bits that the format holds it with, or at `some`, and None: plain weights."""
    every = [replace(scheme, bits=bits) for bits in some or FORMATS[format_name].bits]
    return [*(each for each in every if is_held(format_name, each)), None]


def fused(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The linears that must have one scheme, by the name of their group: runtimes compute them as one matrix.

    All experts of a block are one group.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for index in range(config.layers):
        prefix = config.block(index)
        for site in config.sites(index):
            group = f"{prefix}.{site.name if site.expert is None else 'experts'}"
            groups[group] = (*groups.get(group, ()), *(f"{prefix}.{linear}" for linear in site.linears))
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All that can be chosen: `groups` as `fused` has them, and by linear its candidates, their sizes, its weights."""

    groups: Mapping[str, Sequence[str]]
    schemes: Mapping[str, Sequence[Scheme | None]]
    sizes: Mapping[str, Mapping[Scheme | None, int]]
    weights: Mapping[str, int]


def bit_candidates(config: DecoderConfig, settings: QuantizeSettings) -> Table:
    """Every number of bits that the format holds for each linear, but for those that `overrides` decides on.

    Raises SettingsError where the target cannot be met.
    """
    from llmopt.formats.reading import get_format, linears

    common, encoding = settings.common, get_format(settings.common.format)
    schemes: dict[str, Sequence[Scheme | None]] = {}
    sizes: dict[str, Mapping[Scheme | None, int]] = {}
    weights: dict[str, int] = {}
    for name, shape in linears(config).items():
        scheme = settings.scheme_of(name)
        if scheme is None or (name == config.family.head and not common.lm_head):
            continue
        decided = any(fnmatchcase(name, pattern) for pattern in common.overrides)
        schemes[name] = [scheme] if decided else candidates(scheme, common.format, common.target_bits)
        sizes[name] = stored_bits(shape, schemes[name], encoding.layout, config.dtype)
        weights[name] = shape[0] * shape[1]
    together = fused(config) | ({config.family.head: (config.family.head,)} if config.family.head in schemes else {})
    groups = {group: kept for group, names in together.items() if (kept := [name for name in names if name in schemes])}
    if common.target_bpw is not None:
        check_target(groups, sizes, weights, common.target_bpw)
    return Table(groups=groups, schemes=schemes, sizes=sizes, weights=weights)


def stored_bits(
    shape: tuple[int, int],
    schemes: Sequence[Scheme | None],
    layout: Callable[[tuple[int, int], Scheme], Layout],
    dtype: str,
) -> dict[Scheme | None, int]:
    """What a linear of (O, I) takes on disk with each scheme.

    layout: of the format. dtype: of the checkpoint, which plain weights have, and scales where the format lets them.
    """
    plain = _BITS[dtype] * prod(shape)
    found: dict[Scheme | None, int] = {}
    for scheme in schemes:
        parts = layout(shape, scheme).values() if scheme is not None else ()
        stored = sum(_BITS[dtype if dtype in p.dtypes else p.dtypes[0]] * prod(p.shapes[0]) for p in parts)
        found[scheme] = plain if scheme is None else stored
    return found


def choose(
    groups: Mapping[str, Sequence[str]],
    costs: Mapping[str, Mapping[Scheme | None, float]],
    sizes: Mapping[str, Mapping[Scheme | None, int]],
    weights: Mapping[str, int],
    target_bpw: float,
) -> Choice:
    """The choice of least predicted KL with at most `target_bpw` bits per weight.

    costs, sizes (in bits), weights (how many): by linear. A linear's candidates are the schemes that `sizes` has for
    it, a group's those that all of its linears have. Of equal choices the smaller one is taken; what is equal even then
    is decided by the order given. Raises SettingsError where nothing fits.
    """
    total = check_target(groups, sizes, weights, target_bpw)
    options = {
        group: [
            Option(scheme=scheme, cost=sum(costs[linear][scheme] for linear in linears), size_bits=size)
            for scheme, size in _shared_sizes(group, [sizes[linear] for linear in linears]).items()
        ]
        for group, linears in groups.items()
    }
    picked = _knapsack(list(options.values()), int(_wanted_bits(target_bpw, total)))
    return Choice(options=dict(zip(options, picked, strict=True)), groups=groups, weights=total)


def check_target(
    groups: Mapping[str, Sequence[str]],
    sizes: Mapping[str, Mapping[Scheme | None, int]],
    weights: Mapping[str, int],
    target_bpw: float,
) -> int:
    """SettingsError unless something fits; arguments as for `choose`, before any cost is known. Returns all weights."""
    of_groups = [_shared_sizes(group, [sizes[linear] for linear in linears]) for group, linears in groups.items()]
    total = sum(weights[linear] for linears in groups.values() for linear in linears)
    smallest, largest = (sum(pick(of_group.values()) for of_group in of_groups) for pick in (min, max))
    if not smallest <= _wanted_bits(target_bpw, total) <= largest:
        raise SettingsError(
            f"`target_bpw` cannot be {target_bpw:g}",
            hint=f"here it lies between {_ceil(smallest, total)} and {_floor(largest, total)} bits per weight, "
            "scales and zero points included",
        )
    return total


def _wanted_bits(target_bpw: float, weights: int) -> Fraction:
    return Fraction(repr(target_bpw)) * weights  # the decimal that was asked for, not the float next to it


def _ceil(bits: int, weights: int) -> float:
    """Bits per weight, rounded up to four digits: asking for that much is enough."""
    return -(-bits * 10_000 // weights) / 10_000


def _floor(bits: int, weights: int) -> float:
    return bits * 10_000 // weights / 10_000


def _shared_sizes(group: str, sizes: Sequence[Mapping[Scheme | None, int]]) -> dict[Scheme | None, int]:
    shared = {scheme: sum(s[scheme] for s in sizes) for scheme in sizes[0] if all(scheme in s for s in sizes)}
    if not shared:
        raise SettingsError(
            f"the linears of `{group}` cannot have different schemes: runtimes compute them as one matrix",
            hint="give all of them the same `overrides`",
        )
    return shared


@dataclass(frozen=True, slots=True)
class _State:
    """A choice for some of the groups."""

    size: int
    cost: int
    option: Option | None = None
    before: _State | None = None


def _knapsack(groups: Sequence[Sequence[Option]], capacity: int) -> list[Option]:
    """One option of each group, of the least total cost within `capacity` bits, which must be feasible."""
    largest = max(option.cost for options in groups for option in options) or 1.0
    tables = [_useful(options, largest) for options in groups]
    price = _price(tables, capacity)
    known = _filled(tables, price, capacity)
    order = sorted(range(len(tables)), key=lambda g: tables[g][0].size - tables[g][-1].size)  # most to win first
    least_size = sum(table[0].size for table in tables)
    least_paid = sum(min(o.cost + price * o.size for o in table) for table in tables)
    states = [_State(0, 0)]
    for g in order:
        least_size -= tables[g][0].size
        least_paid -= min(o.cost + price * o.size for o in tables[g])
        reached = [_State(s.size + o.size, s.cost + o.cost, o.option, s) for s in states for o in tables[g]]
        bound = known + price * capacity - least_paid
        states = _undominated(
            s for s in reached if s.size + least_size <= capacity and s.cost + price * s.size <= bound
        )
    found: list[Option] = []
    last: _State | None = states[-1]  # the largest and so the cheapest
    while last is not None and last.option is not None:
        found.append(last.option)
        last = last.before
    by_group = dict(zip(order, reversed(found), strict=True))
    return [by_group[g] for g in range(len(groups))]


def _useful(options: Sequence[Option], largest: float) -> list[_State]:
    """Options by rising size, without those that are no better than a smaller one; costs become whole numbers."""
    return _undominated(_State(o.size_bits, int(ldexp(o.cost / largest, 60)), o) for o in options)


def _undominated(states: Iterable[_State]) -> list[_State]:
    kept: list[_State] = []
    for state in sorted(states, key=lambda s: (s.size, s.cost)):
        if not kept or state.cost < kept[-1].cost:
            kept.append(state)
    return kept


def _price(tables: Sequence[Sequence[_State]], capacity: int) -> int:
    """The least cost per bit at which the groups, each for itself, would buy no more than `capacity`."""
    low, high = 0, 1 << 61
    while low < high:
        middle = (low + high) // 2
        if sum(_bought(table, middle).size for table in tables) <= capacity:
            high = middle
        else:
            low = middle + 1
    return low


def _bought(table: Sequence[_State], price: int) -> _State:
    return min(table, key=lambda o: (o.cost + price * o.size, o.size))


def _filled(tables: Sequence[Sequence[_State]], price: int, capacity: int) -> int:
    """The cost of a good choice: what is bought at `price`, then upgrades for as long as one fits, best first."""
    bought = [_bought(table, price) for table in tables]
    room = capacity - sum(o.size for o in bought)
    while True:
        upgrades = [
            (Fraction(o.cost - bought[g].cost, o.size - bought[g].size), g, o)
            for g, table in enumerate(tables)
            for o in table
            if bought[g].size < o.size <= bought[g].size + room
        ]
        if not upgrades:
            return sum(o.cost for o in bought)
        _, g, option = min(upgrades, key=lambda upgrade: upgrade[:2])
        room -= option.size - bought[g].size
        bought[g] = option
