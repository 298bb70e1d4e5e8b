"""What a format holds is said without numpy, and said clearly."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from llmopt.errors import SettingsError
from llmopt.formats.reading import get_format
from llmopt.formats.scheme import FORMATS, Scheme, check_scheme, check_schemes

W4 = Scheme(bits=4, group_size=128, symmetric=True)
W8 = Scheme(bits=8, group_size=128, symmetric=True)
FP8 = Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic", kind="float")
UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("awq", Scheme(bits=3, group_size=128, symmetric=True), "cannot hold 3-bit weights"),
        ("gptq", Scheme(bits=5, group_size=128, symmetric=True), "cannot hold 5-bit weights"),
        ("gptq", FP8, "cannot hold FP8 weights"),
        ("modelopt", Scheme(bits=4, group_size=128, symmetric=False), "cannot hold zero points beside 4-bit weights"),
        ("modelopt", Scheme(bits=4, group_size=-1, symmetric=True), "cannot hold 4-bit weights with one scale a row"),
        ("modelopt", W8, "cannot hold 8-bit weights with one scale a group"),
        ("compressed-tensors", Scheme(bits=4, group_size=0, symmetric=True), "with one scale a tensor"),
        (
            "modelopt",
            Scheme(bits=8, group_size=-1, symmetric=True, activations="dynamic"),
            r"cannot hold quantized activations \(dynamic\) beside 8-bit weights",
        ),
        ("compressed-tensors", Scheme(bits=4, group_size=-1, symmetric=True, kind="float"), "8-bit and symmetric"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name: str, scheme: Scheme, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        check_scheme(name, scheme)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "schemes", "message"),
    [
        ("gptq", {UP: W4, DOWN: W8, HEAD: None}, "one scheme for all linears, not 2"),
        ("awq", {UP: W4, DOWN: Scheme(bits=4, group_size=32, symmetric=True)}, "one scheme for all linears"),
        ("gptq", {UP: W4, DOWN: None, HEAD: None}, "cannot leave `model.layers.0.mlp.down_proj` unquantized"),
        ("compressed-tensors", {UP: W4, DOWN: Scheme(bits=4, group_size=0, symmetric=True)}, "one scale a tensor"),
    ],
)
def test_a_mixture_that_a_format_cannot_hold_is_refused(
    name: str, schemes: dict[str, Scheme | None], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        check_schemes(name, schemes)


@pytest.mark.parametrize(("name", "kv_cache"), [("gptq", "fp8"), ("awq", "int8"), ("modelopt", "int8")])
def test_a_kv_cache_that_a_format_cannot_hold_is_refused(name: str, kv_cache: str) -> None:
    with pytest.raises(SettingsError, match=f"KV cache in {kv_cache}") as caught:
        check_schemes(name, {UP: W4, HEAD: None}, kv_cache)  # type: ignore[arg-type]
    assert "`compressed-tensors`" in str(caught.value.hint)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_usual(name: str) -> None:
    check_schemes(name, {UP: W4, DOWN: W4, HEAD: None})


def test_one_scheme_is_written_as_ever() -> None:
    config = get_format("compressed-tensors").config({UP: W4, DOWN: W4, HEAD: None})
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    assert config["kv_cache_scheme"] is None
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert list(config["config_groups"]) == ["group_0"]


def test_linears_that_differ_are_named_and_those_of_all_blocks_together() -> None:
    blocks = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1, 10) for name in ("up", "gate", "down")]
    schemes = {prefix: W8 if "down" in prefix else W4 for prefix in blocks}
    config = get_format("compressed-tensors").config(schemes | {"lm_head": FP8, blocks[0]: None})
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert config["format"] == "mixed-precision"
    assert targets[4] == ["Linear"]
    assert config["ignore"] == [blocks[0]]
    found = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert found["float-quantized"] == ["lm_head"]
    (pattern,) = next(
        g["targets"]
        for g in config["config_groups"].values()
        if g["weights"]["group_size"] == 128 and g["weights"]["num_bits"] == 8
    )
    assert {p for p in [*blocks, "model.layers.100.mlp.down_proj"] if re.match(pattern.removeprefix("re:"), p)} == {
        prefix for prefix in blocks if "down" in prefix
    }


def test_the_table_of_formats_loads_nothing_heavy() -> None:
    code = "import sys, llmopt.formats.scheme; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
