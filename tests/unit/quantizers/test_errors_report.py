from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from llmopt.formats.scheme import Scheme
from llmopt.quantizers import errors_report

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SVG = "{http://www.w3.org/2000/svg}"


def scheme(bits: int = 4, group_size: int = 128) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=True)


def llama(blocks: int = 3) -> dict[str, float]:
    """Errors that grow with the block and with the kind."""
    return {
        f"model.layers.{block}.{kind}": 0.01 * (1 + block) * (1 + number)
        for block in range(blocks)
        for number, kind in enumerate(KINDS)
    }


def moe(blocks: int = 2, experts: int = 8) -> dict[str, float]:
    return {
        f"model.layers.{block}.{kind}": 0.02 + 0.01 * block + 0.001 * number
        for block in range(blocks)
        for number, kind in enumerate(
            ["self_attn.q_proj", *(f"mlp.experts.{e}.{n}" for e in range(experts) for n in ("up_proj", "down_proj"))]
        )
    }


def write(out: Path, errors: Mapping[str, float], bits: Mapping[str, int] | None = None) -> Path:
    schemes = {name: scheme((bits or {}).get(name, 4)) for name in errors}
    errors_report.write(out, errors, schemes, method="gptq")
    return out


def rows(markdown: str) -> list[list[str]]:
    """Cells of the first table, without its second line."""
    table = markdown[markdown.index("| block") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:1] + table[2:]]


def drawn(out: Path) -> ET.Element:
    return ET.fromstring((out / "errors.svg").read_text())


def points(element: ET.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in element.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_json_has_the_blocks_in_order_with_errors_and_bits(tmp_path: Path) -> None:
    errors = dict(reversed(llama(11).items())) | {"lm_head": 0.5}
    found = json.loads((write(tmp_path, errors, {"lm_head": 8}) / "errors.json").read_text())
    assert [block["block"] for block in found["blocks"]] == [*(f"model.layers.{n}" for n in range(11)), "lm_head"]
    assert found["blocks"][2]["errors"]["mlp.gate_proj"] == 0.09
    assert found["blocks"][2]["bits"] == dict.fromkeys(reversed(KINDS), 4)
    assert found["blocks"][-1] == {"block": "lm_head", "errors": {"lm_head": 0.5}, "bits": {"lm_head": 8}}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("gpt_neox.layers.12.attention.query_key_value", "gpt_neox.layers.12", "attention.query_key_value"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0", "attn.c_attn"),
        ("model.layers.0.mlp.experts.17.w1", "model.layers.0", "mlp.experts.*.w1"),
        ("lm_head", "lm_head", "lm_head"),
    ],
)
def test_names_of_every_family_are_taken_apart(name: str, block: str, kind: str) -> None:
    linear = errors_report.Linear.of(name, 0.1, scheme())
    assert (linear.block, linear.kind) == (block, kind)


def test_the_table_has_blocks_kinds_the_worst_and_means(tmp_path: Path) -> None:
    markdown = (write(tmp_path, llama() | {"lm_head": 0.011}) / "errors.md").read_text()
    table = rows(markdown)
    assert table[0] == ["block", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert table[1] == ["model.layers.0", "0.0100", "0.0200", "0.0300", "0.0400", "0.0500"]
    assert table[3] == ["model.layers.2", "**0.0300**", "**0.0600**", "**0.0900**", "**0.1200**", "**0.1500**"]
    assert table[4] == ["mean", "0.0200", "0.0400", "0.0600", "0.0800", "0.1000"]
    assert "gptq, 4 bits, groups of 128. Mean 0.0569, worst 0.1500 in `model.layers.2.mlp.down_proj`." in markdown
    assert "`lm_head`: 0.0110" in markdown
    assert "## Bits" not in markdown


def test_experts_are_a_median_and_its_range(tmp_path: Path) -> None:
    table = rows((write(tmp_path, moe()) / "errors.md").read_text())
    assert table[0] == ["block", "q_proj", "experts.*.up_proj", "experts.*.down_proj"]
    assert table[1][2] == "0.0280 (0.0210 to 0.0350)"
    assert table[2][2] == "0.0380 (0.0310 to **0.0450**)"


def test_bits_that_differ_get_a_table_and_a_panel(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    same = drawn(write(tmp_path / "same", llama()))
    mixed = write(tmp_path, llama(), {"model.layers.1.mlp.up_proj": 8})
    table = rows((mixed / "errors.md").read_text().partition("## Bits")[2])
    assert table[2] == ["model.layers.1", "4", "4", "4", "8", "4"]
    assert "gptq, 4 to 8 bits, groups of 128" in (mixed / "errors.md").read_text()
    assert not [r for r in same.iter(f"{SVG}rect") if r.get("class") == "bit"]
    cells = [r for r in drawn(mixed).iter(f"{SVG}rect") if r.get("class") == "bit" and r.get("height") == "14"]
    assert len(cells) == 15
    assert len({r.get("fill-opacity") for r in cells}) == 2


def test_the_picture_has_a_line_a_kind_and_higher_is_worse(tmp_path: Path) -> None:
    lines = [points(line) for line in drawn(write(tmp_path, llama())).iter(f"{SVG}polyline")]
    assert len(lines) == len(KINDS)
    for line in lines:
        assert all(right[0] > left[0] and right[1] < left[1] for left, right in pairwise(line))
    # on a log axis a doubling is the same way everywhere
    assert lines[0][0][1] - lines[1][0][1] == pytest.approx(lines[1][0][1] - lines[3][0][1], abs=0.2)


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    root = drawn(write(tmp_path, llama()))
    ids = {element.get("id"): element.text or "" for element in root if element.get("id")}
    assert root.attrib["role"] == "img"
    assert set(root.attrib["aria-labelledby"].split()) == set(ids)
    assert ids["title"] == "Relative error of each linear: gptq, 4 bits, groups of 128"
    assert "over 3 blocks" in ids["desc"]
    assert "worst 0.1500 in model.layers.2.mlp.down_proj" in ids["desc"]
    told = [mark.text for mark in root.iter(f"{SVG}title")]
    assert "model.layers.2.mlp.down_proj: 0.1500, 4 bits" in told
    assert "prefers-color-scheme:dark" in (tmp_path / "errors.svg").read_text()


@pytest.mark.parametrize(
    "errors",
    [
        llama(1),
        llama(80),
        moe(48, 64),
        {"lm_head": 0.1},
        dict.fromkeys(llama(), 0.0),
        llama() | {"model.layers.1.mlp.up_proj": 0.0, "model.layers.2.mlp.up_proj": 1e-30},
        dict.fromkeys(llama(), 0.04),
        {
            f"model.layers.{n}.mlp.experts.{e}.fc<{e % 12}>&{k}": 0.1
            for n in range(3)
            for e in range(2)
            for k in range(30)
        },
    ],
    ids=["one block", "80 blocks", "many experts", "head only", "no error", "some without", "all equal", "60 kinds"],
)
def test_everything_drawn_lies_in_the_picture(tmp_path: Path, errors: dict[str, float]) -> None:
    root = drawn(write(tmp_path, errors))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        if "points" in element.attrib:
            assert all(0 <= x <= width and 60 <= y <= height for x, y in points(element))
        for name, most in (("x", width), ("y", height), ("cx", width), ("cy", height)):
            assert 0 <= float(element.get(name, "0")) <= most
    labels = sorted(float(t.attrib["y"]) for t in root.iter(f"{SVG}text") if t.find(f"{SVG}tspan") is not None)
    assert labels
    assert all(lower - upper >= 16.9 for upper, lower in pairwise(labels))
    assert (tmp_path / "errors.svg").stat().st_size < 300_000


def test_a_block_without_a_kind_breaks_its_line(tmp_path: Path) -> None:
    errors = {name: error for name, error in llama(5).items() if name != "model.layers.2.mlp.up_proj"}
    lines = [points(line) for line in drawn(write(tmp_path, errors)).iter(f"{SVG}polyline")]
    assert sorted(len(line) for line in lines) == [2, 2, 5, 5, 5, 5]
    table = rows((tmp_path / "errors.md").read_text())
    assert table[3][4] == ""


def test_the_same_errors_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from llmopt.quantizers import errors_report\n"
        "from llmopt.formats.scheme import Scheme\n"
        "e = {f'model.layers.{b}.mlp.{k}_proj': 0.1 / (1 + b + i) for b in range(3) for i, k in enumerate('abc')}\n"
        "s = {n: Scheme(bits=3 + n.count('b_'), group_size=32, symmetric=True) for n in e}\n"
        "errors_report.write(Path(sys.argv[1]), e, s, method='awq')\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules)\n"
    )
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", code, out], check=True, env=environment, timeout=60)
        found.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"errors.json", "errors.md", "errors.svg"}


def test_without_linears_there_is_nothing_to_write(tmp_path: Path) -> None:
    assert not list(write(tmp_path, {}).iterdir())


def test_the_worst_are_named_in_full(tmp_path: Path) -> None:
    written = json.loads((write(tmp_path, llama() | {"lm_head": 0.9}, {"lm_head": 8}) / "errors.json").read_text())
    assert errors_report.worst(written, 2) == [
        {"linear": "lm_head", "error": 0.9, "bits": 8},
        {"linear": "model.layers.2.mlp.down_proj", "error": 0.15, "bits": 4},
    ]


def test_schemes_are_put_in_words() -> None:
    assert errors_report.describe([scheme()] * 3) == "4 bits, groups of 128"
    assert errors_report.describe([scheme(8, -1), scheme(3), scheme(4, 32)]) == (
        "3 to 8 bits, groups of 32 or 128, a scale a row"
    )
    eight = Scheme(bits=8, group_size=-1, symmetric=True, activations="static")
    assert errors_report.describe([eight]) == "8 bits, a scale a row, activations too"


def test_colours_can_be_told_from_their_ground() -> None:
    from llmopt.quantizers import errors_chart

    def luminance(colour: str) -> float:
        channels = [int(part, 16) / 255 for part in re.findall("..", colour[1:])]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in errors_chart._COLOURS:
        for colour, ground in zip(pair, ("#ffffff", "#0d1117"), strict=True):
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3
