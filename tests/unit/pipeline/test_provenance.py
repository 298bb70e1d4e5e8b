from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from llmopt.errors import BackendMissingError
from llmopt.pipeline import machine, provenance


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's sources, in place of them."""
    copy = tmp_path / "llmopt"
    shutil.copytree(Path(provenance.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "_PACKAGE", copy)
    return copy


def digest(operation: str) -> str:
    return provenance.code_digest.__wrapped__(operation)


def test_a_change_in_the_code_that_runs_changes_its_digest(package: Path) -> None:
    before = {operation: digest(operation) for operation in provenance.SOURCES}
    with (package / "quantizers" / "gptq.py").open("a") as file:
        file.write("# a change\n")
    changed = {operation for operation in before if digest(operation) != before[operation]}
    assert changed == {"quantize"}


def test_shared_code_is_in_the_digest_of_all_that_run_it(package: Path) -> None:
    before = {operation: digest(operation) for operation in provenance.SOURCES}
    with (package / "models" / "config.py").open("a") as file:
        file.write("# a change\n")
    changed = {operation for operation in before if digest(operation) != before[operation]}
    compiled = {operation for operation in before if operation.startswith("compile.")}
    assert changed == {"quantize", "eval"} | compiled


def test_a_targets_code_changes_no_key_of_another(package: Path) -> None:
    before = {operation: digest(operation) for operation in provenance.SOURCES}
    with (package / "compilers" / "ov" / "ir.py").open("a") as file:
        file.write("# a change\n")
    assert {operation for operation in before if digest(operation) != before[operation]} == {"compile.openvino"}


def test_a_renamed_file_changes_the_digest(package: Path) -> None:
    before = digest("quantize")
    (package / "quantizers" / "gptq.py").rename(package / "quantizers" / "gptq2.py")
    assert digest("quantize") != before


def test_what_python_caches_is_not_code(package: Path) -> None:
    before = digest("quantize")
    (package / "quantizers" / "__pycache__").mkdir()
    (package / "quantizers" / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert digest("quantize") == before


@pytest.mark.parametrize("operation", provenance.SOURCES)
def test_every_source_is_there(package: Path, operation: str) -> None:
    for source in provenance.SOURCES[operation]:
        assert (package / source).is_dir() or (package / f"{source}.py").is_file()


def test_versions_are_those_installed() -> None:
    assert provenance.versions(["torch"]) == {"torch": importlib.metadata.version("torch")}


def test_a_package_that_is_not_here_is_a_missing_backend() -> None:
    with pytest.raises(BackendMissingError) as caught:
        provenance.versions(["no-such-package-at-all"])
    assert caught.value.message == "the package `no-such-package-at-all` is not installed"


def test_features_of_the_processor_are_read_from_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "cpu_info", lambda: {"model name": "Some CPU", "flags": "fpu avx2 avx512_bf16 amx_tile"}
    )
    cpu = machine.cpu()
    assert cpu["model"] == "Some CPU"
    assert cpu["features"] == ["avx2", "avx512_bf16", "amx_tile"]


def test_a_machine_without_proc_is_still_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda file: "")
    machine.cpu_info.cache_clear()
    try:
        assert machine.cpu()["features"] == []
        assert machine.memory()["total_bytes"] == 0
    finally:
        machine.cpu_info.cache_clear()


def test_every_gpu_is_described_whatever_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, GPU-1, NVIDIA H200, 143771, 570.86.15, 9.0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = machine.gpus()
    assert found == {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "570.86.15", "architecture": "sm_90"}


def test_a_target_whose_package_is_missing_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import compilers

    monkeypatch.setattr(compilers, "deps", lambda settings: ("no-such-package-at-all",))
    (found,) = machine.targets(["openvino"]).values()
    assert found == {"status": "unavailable", "reason": "the package `no-such-package-at-all` is not installed"}
