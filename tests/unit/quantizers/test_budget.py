"""The knapsack against brute force, and sizes against what is stored."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import SettingsError
from llmopt.formats.base import QuantizedWeight
from llmopt.formats.reading import get_format
from llmopt.formats.scheme import Scheme
from llmopt.quantizers.budget import Choice, candidates, check_target, choose, label, stored_bits

SCHEMES = [Scheme(bits=bits, group_size=128, symmetric=True) for bits in (2, 3, 4, 8)]

#: For each linear: how many weights, and the cost and the size of each scheme.
Linears = list[tuple[int, list[tuple[float, int]]]]
instances = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.lists(st.tuples(st.floats(0, 10), st.integers(1, 40)), min_size=1, max_size=len(SCHEMES)),
    ),
    min_size=1,
    max_size=5,
)


def solve(linears: Linears, target_bpw: float) -> Choice:
    names = [f"block.{n}" for n in range(len(linears))]
    tables = [dict(zip(SCHEMES, options, strict=False)) for _, options in linears]
    return choose(
        {name: [name] for name in names},
        {name: {s: cost for s, (cost, _) in table.items()} for name, table in zip(names, tables, strict=True)},
        {name: {s: size for s, (_, size) in table.items()} for name, table in zip(names, tables, strict=True)},
        {name: count for name, (count, _) in zip(names, linears, strict=True)},
        target_bpw,
    )


def least_cost(linears: Linears, capacity: Fraction) -> float | None:
    costs = [
        sum(cost for cost, _ in combination)
        for combination in itertools.product(*(options for _, options in linears))
        if sum(size for _, size in combination) <= capacity
    ]
    return min(costs, default=None)


@settings(deadline=None)
@given(instances, st.integers(1, 4000))
def test_nothing_within_the_target_costs_less(linears: Linears, hundredths: int) -> None:
    target, total = hundredths / 100, sum(count for count, _ in linears)
    least = least_cost(linears, Fraction(hundredths, 100) * total)
    largest = sum(max(size for _, size in options) for _, options in linears)
    if least is None or Fraction(hundredths, 100) * total > largest:
        with pytest.raises(SettingsError, match="`target_bpw` cannot be"):
            solve(linears, target)
        return
    choice = solve(linears, target)
    assert choice.bpw * total <= target * total * (1 + 1e-12)
    assert choice.predicted_kl == pytest.approx(least, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(instances)
def test_more_bits_never_cost_more(linears: Linears) -> None:
    one_weight: Linears = [(int(n == 0), options) for n, (_, options) in enumerate(linears)]
    smallest, largest = (sum(pick(size for _, size in options) for _, options in linears) for pick in (min, max))
    costs = [solve(one_weight, size).predicted_kl for size in (smallest, (smallest + largest) // 2, largest)]
    assert all(more <= less + 1e-9 for less, more in itertools.pairwise(costs))


def test_a_model_of_many_blocks_is_solved_at_once() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    linears: Linears = [
        (size, [(float(base * 4.0**-s.bits), size * s.bits) for s in SCHEMES])
        for size, base in zip(generator.integers(1 << 20, 1 << 27, 128).tolist(), generator.random(128), strict=True)
    ]
    choice = solve(linears, 3.5)
    assert 3.499 < choice.bpw <= 3.5


def test_of_equal_choices_the_first_is_taken() -> None:
    twins: Linears = [(1, [(1.0, 2), (0.5, 3)]), (1, [(1.0, 2), (0.5, 3)])]
    assert [option.size_bits for option in solve(twins, 2.5).options.values()] == [2, 3]
    same: Linears = [(1, [(1.0, 2), (1.0, 2)])]
    assert solve(same, 2).options["block.0"].scheme == SCHEMES[0]


def test_an_option_that_is_larger_and_no_better_is_never_chosen() -> None:
    assert solve([(1, [(1.0, 2), (1.0, 3), (2.0, 4)])], 4).options["block.0"].size_bits == 2


def check(smallest: int, largest: int, weights: int, target_bpw: float) -> None:
    check_target({"b": ["b"]}, {"b": {SCHEMES[0]: smallest, SCHEMES[3]: largest}}, {"b": weights}, target_bpw)


def test_a_target_out_of_reach_names_what_can_be_reached() -> None:
    for target in (2.0, 9.5):
        with pytest.raises(SettingsError, match=f"`target_bpw` cannot be {target:g}") as raised:
            check(2 * 128 + 16, 8 * 128 + 16, 128, target)
        assert raised.value.hint is not None
        assert "between 2.125 and 8.125 bits" in raised.value.hint


def test_the_bounds_that_an_error_names_can_be_asked_for() -> None:
    for target in (3.0031, 9.0090):  # 1000 / 333 rounded up, 3000 / 333 rounded down
        check(1000, 3000, 333, target)
    for target in (3.003, 9.0091):
        with pytest.raises(SettingsError, match=r"`target_bpw` cannot be"):
            check(1000, 3000, 333, target)


def test_fused_linears_get_one_scheme() -> None:
    sizes = {scheme: scheme.bits for scheme in SCHEMES}
    choice = choose(
        {"b.qkv": ["b.q", "b.k"]},
        {"b.q": dict.fromkeys(SCHEMES, 0.1), "b.k": {scheme: 1.0 / scheme.bits for scheme in SCHEMES}},
        {"b.q": sizes, "b.k": sizes},
        {"b.q": 1, "b.k": 1},
        4,
    )
    assert choice.schemes == {"b.q": SCHEMES[2], "b.k": SCHEMES[2]}
    assert choice.bpw == 4


def test_fused_linears_that_share_no_scheme_are_an_error() -> None:
    sizes = {"b.q": {SCHEMES[0]: 2}, "b.k": {SCHEMES[1]: 3}}
    with pytest.raises(SettingsError, match=r"the linears of `b\.qkv` cannot have different schemes"):
        choose({"b.qkv": ["b.q", "b.k"]}, sizes, sizes, {"b.q": 1, "b.k": 1}, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("name", "bits"), [("compressed-tensors", 3), ("gptq", 4), ("awq", 4)])
def test_the_size_is_that_of_what_is_stored(name: str, bits: int, symmetric: bool) -> None:
    scheme, shape = Scheme(bits=bits, group_size=128, symmetric=symmetric), (64, 256)
    weight = QuantizedWeight(
        codes_OI=np.zeros(shape, np.uint8),
        scale_OG=np.ones((64, 2), np.float32),
        zero_OG=None if symmetric else np.ones((64, 2), np.uint8),
        bits=bits,
    )
    stored = get_format(name).encode(weight, scheme, "BF16", None)
    assert stored_bits(shape, [scheme, None], get_format(name).layout, "BF16") == {
        scheme: sum(tensor.array.nbytes * 8 for tensor in stored.values()),
        None: 64 * 256 * 16,
    }


def test_candidates_are_what_the_format_holds() -> None:
    assert candidates(SCHEMES[2], "gptq") == [*SCHEMES, None]
    assert len(candidates(SCHEMES[2], "compressed-tensors")) == 8


def test_the_report_has_a_row_a_block() -> None:
    linears: Linears = [(1, [(0.25, 2)]), (1, [(0.5, 3)])]
    choice = solve(linears, 2.5)
    assert choice.markdown() == "| block | 0 | 1 |\n| --- | --- | --- |\n| block | W2 g128 | W2 g128 |"
    assert choice.to_json() == {
        "bpw": 2.5,
        "predicted_kl": 0.75,
        "schemes": {"block.0": "W2 g128", "block.1": "W2 g128"},
    }
    assert [label(None), label(Scheme(bits=8, group_size=-1, symmetric=False))] == ["plain", "W8 asym"]
