from __future__ import annotations

import pytest

from llmopt.errors import SettingsError
from llmopt.planner import hardware


def test_names_are_found_in_any_case() -> None:
    assert hardware.find("h100").name == "H100"
    assert hardware.find("G5.48XLarge").device == "A10G"


def test_sagemakers_names_are_the_instances() -> None:
    assert hardware.find("ml.g5.48xlarge") == hardware.find("g5.48xlarge")


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"unknown hardware `g5\.48xlrge`") as caught:
        hardware.find("g5.48xlrge")
    assert caught.value.hint == "did you mean `g5.48xlarge`?"


def test_g5_48xlarge_has_192_gb() -> None:
    assert 8 * hardware.find("g5.48xlarge").memory_bytes == 192 * 10**9


def test_architectures_are_named_as_tensorrt_llm_does() -> None:
    named = {name: hardware.find(name).architecture for name in ("T4", "A10G", "A100", "L40S", "H100", "B200")}
    assert named == {
        "T4": "sm_75",
        "A10G": "sm_86",
        "A100": "sm_80",
        "L40S": "sm_89",
        "H100": "sm_90",
        "B200": "sm_100",
    }


def test_a_multiple_of_a_device_shares_its_row_and_has_no_price() -> None:
    row = hardware.find("8xH100")
    assert (row.devices, row.device, row.price_usd_h) == (8, "H100", None)
    assert (row.devices, row.memory_bytes) == (8, hardware.find("H100").memory_bytes)


def test_a_multiple_of_an_instance_is_refused() -> None:
    with pytest.raises(SettingsError, match="2 instances"):
        hardware.find("2xp5.48xlarge")


def test_every_row_says_where_it_is_from() -> None:
    for row in hardware.table().values():
        assert len(row.source) > 10, row.name
        assert (row.price_usd_h is None) == (row.price_source == "price not known"), row.name


def test_fp8_is_only_where_the_architecture_has_it() -> None:
    for row in hardware.table().values():
        if row.kind == "gpu":
            assert row.capability is not None
            assert ("fp8" in row.flops) == (float(row.capability) >= 8.9), row.name


def test_peaks_are_dense() -> None:
    """The halves of what the data sheets give with sparsity: FP8 is twice FP16, FP16 twice what it is with zeros."""
    for row in hardware.table().values():
        if "fp8" in row.flops:
            assert row.flops["fp8"] == pytest.approx(2 * row.flops["fp16"], rel=0.02), row.name
    assert hardware.find("H100").flops["fp16"] == 989e12


def test_a_part_of_a_socket_has_that_part_of_its_bandwidth() -> None:
    whole, part = hardware.find("c7i.24xlarge"), hardware.find("c7i.8xlarge")
    assert part.bandwidth_bytes_s * 3 == pytest.approx(whole.bandwidth_bytes_s)
    assert part.flops["int8"] * 3 == pytest.approx(whole.flops["int8"])


def test_a_users_price_replaces_the_tables() -> None:
    row = hardware.find("g5.48xlarge").priced(9.99)
    assert (row.price_usd_h, row.price_source) == (9.99, "given")


def test_a_number_of_devices_is_read_whatever_the_case() -> None:
    assert hardware.find("8XH100") == hardware.find("8xh100") == hardware.find("8xH100")
