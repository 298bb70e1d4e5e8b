from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmopt.compilers.trt_llm import gpu
from llmopt.compilers.trt_llm.gpu import Gpu, probe

H100 = "0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0"
L4 = "1, GPU-bbbb-2, NVIDIA L4, 23034, 570.86.15, 8.9"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without nvidia-smi and an empty driver folder; a test adds what it wants to be found."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "gpus").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gpu, "_DRIVER_FOLDER", tmp_path / "gpus")
    return tmp_path


def nvidia_smi(driver: Path, script: str) -> None:
    file = driver / "bin" / "nvidia-smi"
    file.write_text("#!/bin/sh\n" + script)
    file.chmod(0o755)


def rows(*lines: str) -> str:
    return "".join(f"echo '{line}'\n" for line in lines)


def test_every_gpu_is_described(driver: Path) -> None:
    nvidia_smi(driver, rows(H100, L4))
    found = probe({})
    assert found.gpus == (
        Gpu(name="NVIDIA H100 80GB HBM3", uuid="GPU-aaaa-1", memory_mib=81559, driver="570.86.15", capability="9.0"),
        Gpu(name="NVIDIA L4", uuid="GPU-bbbb-2", memory_mib=23034, driver="570.86.15", capability="8.9"),
    )
    assert [device.architecture for device in found.gpus] == ["sm_90", "sm_89"]
    assert [device.name for device in found.of("sm_89")] == ["NVIDIA L4"]
    assert found.of(None) == found.gpus
    assert str(found) == "1 x NVIDIA H100 80GB HBM3 (sm_90), 1 x NVIDIA L4 (sm_89)"


def test_what_a_gpu_does_not_say_is_none(driver: Path) -> None:
    nvidia_smi(driver, rows("0, GPU-a, NVIDIA GB10, [N/A], 580.1, 12.1"))
    (found,) = probe({}).gpus
    assert (found.memory_mib, found.architecture) == (None, "sm_121")


def test_an_old_driver_that_knows_no_capabilities_is_asked_for_the_rest(driver: Path) -> None:
    refusal = "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2"
    answer = "echo '0, GPU-a, Tesla T4, 15360, 450.1'"
    nvidia_smi(driver, f'case "$1" in *compute_cap*) {refusal};; esac\n{answer}\n')
    (found,) = probe({}).gpus
    assert (found.name, found.memory_mib, found.architecture) == ("Tesla T4", 15360, None)
    assert str(probe({})) == "1 x Tesla T4 (architecture unknown)"


def test_the_drivers_folder_is_read_where_nvidia_smi_is_not(driver: Path) -> None:
    folder = driver / "gpus" / "0000:00:01.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   33\n")
    assert probe({}).gpus == (Gpu(name="NVIDIA H200"),)


def test_without_a_gpu_it_says_what_was_tried(driver: Path) -> None:
    assert str(probe({})) == f"`nvidia-smi` is not installed; `{driver / 'gpus'}` has no GPU"


def test_a_driver_that_fails_is_quoted(driver: Path) -> None:
    nvidia_smi(driver, "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9\n")
    assert "`nvidia-smi` failed: NVIDIA-SMI has failed because" in str(probe({}))


def test_a_driver_that_hangs_is_given_up(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "`nvidia-smi` did not answer" in str(probe({}))


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("0", ["NVIDIA H100 80GB HBM3"]),
        ("1,0", ["NVIDIA L4", "NVIDIA H100 80GB HBM3"]),
        ("GPU-bbbb", ["NVIDIA L4"]),
        ("1,7,0", ["NVIDIA L4"]),  # CUDA stops at the first that names nothing
        ("", []),
        ("-1", []),
        ("MIG-4f0c", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]),
    ],
)
def test_only_visible_gpus_count(driver: Path, setting: str, names: list[str]) -> None:
    nvidia_smi(driver, rows(H100, L4))
    found = probe({"CUDA_VISIBLE_DEVICES": setting})
    assert [device.name for device in found.gpus] == names
    if not names:
        assert f"`CUDA_VISIBLE_DEVICES={setting}` shows 0 of 2" in str(found)
