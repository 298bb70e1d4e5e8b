from __future__ import annotations

import pytest

from llmopt.errors import Exit, SettingsError
from llmopt.quantizers.settings import AWQ, GPTQ, resolve


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
    ],
)
def test_a_bad_setting_is_an_error_with_a_hint(settings: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(settings)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "rtn"])
def test_resolving_what_was_resolved_changes_nothing(method: str) -> None:
    settings = resolve({"method": method})
    assert resolve(settings.to_json()) == settings
