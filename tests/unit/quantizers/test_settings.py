from __future__ import annotations

import pytest

from llmopt.artifacts.manifest import canonical_json
from llmopt.errors import Exit, SettingsError
from llmopt.formats.scheme import Scheme
from llmopt.quantizers.settings import AWQ, GPTQ, METHODS, SmoothQuant, resolve


def test_the_default_is_gptq_at_4_bits() -> None:
    settings = resolve({})
    assert settings.method == GPTQ(bits=4, group_size=128, symmetric=True)
    assert settings.to_json()["format"] == "compressed-tensors"


def test_awq_has_zero_points_by_default() -> None:
    assert resolve({"method": "awq"}).method == AWQ(symmetric=False)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"method": "gptqq"}, "unknown method `gptqq`", "`gptq`"),
        ({"format": "pack"}, "unknown format `pack`", "compressed-tensors"),
        ({"bits": 9}, "`bits` cannot be 9", "between 2 and 8"),
        ({"bits": 1}, "`bits` cannot be 1", "between 2 and 8"),
        ({"bits": "4"}, "`quantize.bits` must be a whole number", "`128`"),
        ({"group_size": 100}, "`group_size` cannot be 100", "32, 64, 128"),
        ({"grup_size": 32}, "no setting `grup_size`", "`group_size`"),
        ({"method": "rtn", "damping": 0.1}, "`rtn` has no setting `damping`", "belongs to gptq"),
        ({"method": "smoothquant", "bits": 4}, "`quantize.bits` cannot be `4`", "`8`"),
        ({"method": "smoothquant", "alpha": 1.5}, "`alpha` cannot be 1.5", "between 0.0 and 1.0"),
        ({"method": "smoothquant", "format": "gptq"}, "cannot hold quantized activations", "compressed-tensors"),
        ({"method": "rtn", "activations": "dynamic"}, "int8 activations need symmetric 8-bit", "`bits: 8`"),
        ({"bits": 3, "format": "awq"}, "`awq` cannot hold 3-bit", "4 bits"),
        ({"samples": 0}, "`samples` cannot be 0", "between 1"),
        ({"symmetric": 1}, "must be true or false", "`true`"),
        ({"method": "smoothquant", "alpha": "serch"}, "`quantize.alpha` cannot be `serch`", "`search`"),
        ({"scaling": "smoothquant"}, "`activations` leaves them as they are", "`activations: dynamic`"),
        ({"method": "fp8", "weights": "row"}, "`quantize.weights` cannot be `row`", "channel"),
        ({"method": "fp8", "overrides": {"*": {"bits": 4}}}, "`overrides.*` cannot change", "`skip: true`"),
        ({"kv_cache": "fp4"}, "`quantize.kv_cache` cannot be `fp4`", "`fp8`"),
        ({"precision": "bf16"}, "`quantize.precision` cannot be `bf16`", "auto"),
        ({"target_bpw": 1.5}, "`target_bpw` cannot be 1.5", "between 2.0 and 8.5"),
        ({"target_bpw": 4.25, "method": "smoothquant"}, "`smoothquant` needs 8 of them", "`gptq`"),
        ({"target_bpw": 4.25, "method": "fp8"}, "`fp8` needs 8 of them", "`gptq`"),
        ({"overrides": 3}, "`quantize.overrides` must be a mapping", "`name: ...`"),
        ({"overrides": {"*": 3}}, "`quantize.overrides.*` must be a mapping", "`{bits: ...}`"),
        ({"overrides": {"*": {"bit": 3}}}, "`quantize.overrides.*` has no setting `bit`", "`bits`"),
        ({"overrides": {"*": {"bits": 9}}}, "`bits` cannot be 9", "between 2 and 8"),
        ({"overrides": {"*": {"group_size": 48}}}, "`group_size` cannot be 48", "32, 64, 128"),
        ({"overrides": {"*": {}}}, "`overrides` changes nothing", "`skip: true`"),
        ({"overrides": {"*": {"skip": True, "bits": 4}}}, "cannot both skip", "`skip: true`"),
        ({"format": "awq", "overrides": {"*": {"bits": 8}}}, "`awq` cannot hold 8-bit", "4 bits"),
    ],
)
def test_a_bad_setting_is_an_error_with_a_hint(settings: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(settings)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("method", METHODS)
def test_resolving_what_was_resolved_changes_nothing(method: str) -> None:
    settings = resolve({"method": method, "overrides": {"*.q_proj": {"skip": True}}})
    assert resolve(settings.to_json()) == settings


def test_the_last_pattern_that_matches_counts() -> None:
    overrides = {
        "*.down_proj": {"bits": 8, "group_size": 32},
        "*.0.*": {"skip": True},
        "*.0.mlp.*": {"symmetric": False},
    }
    settings = resolve({"overrides": overrides})
    assert settings.scheme_of("layers.1.mlp.down_proj") == Scheme(bits=8, group_size=32, symmetric=True)
    assert settings.scheme_of("layers.0.mlp.down_proj") == Scheme(bits=4, group_size=128, symmetric=False)
    assert settings.scheme_of("layers.0.self_attn.q_proj") is None
    assert settings.scheme_of("layers.1.self_attn.q_proj") == settings.method.scheme


def test_overrides_in_another_order_are_other_settings() -> None:
    """An action's key is of JSON with sorted keys, so the order must be in something else."""
    first, second = {"a*": {"bits": 8}}, {"*b": {"bits": 3}}
    one, other = (canonical_json(resolve({"overrides": o}).to_json()) for o in (first | second, second | first))
    assert one != other


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"method": "rtn"}, False),
        ({"method": "rtn", "target_bpw": 4.25}, True),
        ({"method": "rtn", "kv_cache": "int8"}, True),
        ({"method": "fp8"}, False),
        ({"method": "fp8", "activations": "static"}, True),
        ({"method": "awq"}, True),
    ],
)
def test_a_text_is_needed_only_for_what_is_calibrated(settings: dict[str, object], needs: bool) -> None:
    assert resolve(settings).needs_calibration == needs


@pytest.mark.parametrize(("weights", "group_size"), [("channel", -1), ("tensor", 0)])
def test_fp8_is_symmetric_floats_of_8_bits(weights: str, group_size: int) -> None:
    scheme = resolve({"method": "fp8", "weights": weights, "activations": "static"}).method.scheme
    assert scheme == Scheme(bits=8, group_size=group_size, symmetric=True, activations="static", kind="float")


def test_a_share_of_smoothing_is_a_number_or_searched() -> None:
    assert resolve({"method": "smoothquant"}).method == SmoothQuant(alpha="search")
    assert resolve({"method": "smoothquant", "alpha": 1}).method == SmoothQuant(alpha=1.0)
