"""What this machine is and can do, found without importing any backend."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from llmopt.artifacts.outcome import Json
from llmopt.errors import BackendMissingError, LlmoptError
from llmopt.pipeline.provenance import installed, versions

#: CPU flags that decide which kernels a runtime picks for quantized and half-precision arithmetic.
FEATURES = (
    "avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
PACKAGES = (
    "torch", "transformers", "safetensors", "tokenizers", "numpy", "openvino", "openvino-genai", "openvino-tokenizers",
    "starlette", "uvicorn", "compressed-tensors",
)  # fmt: skip


def cpu() -> dict[str, Json]:
    info = cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "model": cpu_model(),
        "arch": platform.machine(),
        "cores": cores(),
        "features": [feature for feature in FEATURES if feature in flags],
    }


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def architecture() -> dict[str, str]:
    """The target of files that are the same on every machine of a kind."""
    return {"arch": platform.machine()}


def arithmetic() -> dict[str, str]:
    """The target of results computed in floating point: the vector width decides the order of its sums."""
    flags = cpu_info().get("flags", "").split()
    return architecture() | {"isa": "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "baseline"}


def has_bfloat16() -> bool:
    """Whether matrix products with BF16 factors are faster here than with float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(
        cpu_info().get("flags", cpu_info().get("Features", "")).split()
    )


def fingerprint() -> dict[str, str]:
    """The target of a measurement: what its figures hold for."""
    return architecture() | {"cpu": cpu_model(), "cores": str(cores())}


@cache
def cpu_info() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is none."""
    text = _read(Path("/proc/cpuinfo"))
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def memory() -> dict[str, Json]:
    """Bytes of the machine and those available now; `limit` is that of a container, where there is one."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    kib = {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1}
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return {
        "total_bytes": kib.get("MemTotal", 0) << 10,
        "available_bytes": kib.get("MemAvailable", 0) << 10,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def disk(folder: Path) -> dict[str, Json]:
    """Of the file system that holds `folder`, which need not exist yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = os.statvfs(there)
    free, total = usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize
    return {"path": str(folder), "total_bytes": total, "free_bytes": free}


def packages() -> dict[str, Json]:
    """The version of each package that some part of llmopt uses; None where it is not installed."""
    return {name: installed(name) for name in PACKAGES}


def gpus() -> list[Json]:
    """NVIDIA GPUs, those that `CUDA_VISIBLE_DEVICES` hides too; None for what the driver does not tell."""
    from llmopt.compilers.trt_llm.gpu import probe

    return [
        {"name": gpu.name, "memory_mib": gpu.memory_mib, "driver": gpu.driver, "architecture": gpu.architecture}
        for gpu in probe({}).gpus
    ]


def targets(names: Iterable[str]) -> dict[str, Json]:
    """What `llmopt compile --target X` comes to here: "compiled", "prepared" or "unavailable", and why."""
    from llmopt import compilers
    from llmopt.compilers.trt_llm import gpu

    found: dict[str, Json] = {}
    for name in names:
        try:
            target = compilers.resolve({"target": name})
            versions(compilers.deps(target))
            if target.portable:
                reason = f"{gpu.probe()}; `--builder` names what builds"
                found[name] = {"status": "prepared", "reason": reason}
            else:
                found[name] = {"status": "compiled", "reason": None}
        except (BackendMissingError, LlmoptError) as error:
            found[name] = {"status": "unavailable", "reason": error.message}
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
