"""The table of hardware: what a GPU, a CPU or a cloud instance can hold, move and compute. Data in hardware.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmopt.errors import SettingsError, nearest

_FILE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device, or one cloud instance with several of them.

    memory_bytes, bandwidth_bytes_s, flops and link_bytes_s are of one device. capability: the CUDA compute capability,
    "9.0". flops: dense peaks by precision ("fp32", "fp16", "fp8", "int8"), empty where no speed is predicted.
    streams: bytes a second at which weights of a precision are read, where unpacking them is slower than the memory.
    link_bytes_s: to a neighbour, one way; None: the devices cannot share a model. bandwidth_efficiency and
    compute_efficiency: the shares that are reached, where the row knows better than its kind. price_usd_h: of all
    devices, None where not known; sources say where the figures are from.
    """

    name: str
    kind: str  # "gpu", "cpu" or "accelerator"
    memory_bytes: int
    bandwidth_bytes_s: float
    capability: str | None = None
    devices: int = 1
    device: str = ""  # of an instance: the name of its device
    flops: Mapping[str, float] = field(default_factory=dict)
    streams: Mapping[str, float] = field(default_factory=dict)
    link_bytes_s: float | None = None
    bandwidth_efficiency: float | None = None
    compute_efficiency: float | None = None
    price_usd_h: float | None = None
    source: str = ""
    price_source: str = "price not known"

    @property
    def architecture(self) -> str | None:
        """As TensorRT-LLM's builds name it: "sm_90"."""
        return None if self.capability is None else "sm_" + self.capability.replace(".", "")

    def priced(self, usd_h: float) -> Hardware:
        """The same at the user's price."""
        return replace(self, price_usd_h=usd_h, price_source="given")


def find(name: str) -> Hardware:
    """The row of a device or an instance, whatever the case of `name`; SettingsError with the nearest name.

    `8xH100`: that many devices, linked as in an instance, without a price. Of SageMaker's `ml.p5.48xlarge` the
    instance without its prefix.
    """
    count, rest = _multiple(name)
    wanted = rest.strip().lower().removeprefix("ml.")
    for known, row in table().items():
        if known.lower() == wanted:
            if count is None:
                return row
            if row.device:
                raise SettingsError(f"`{name}` is {count} instances", hint=f"plan one: `{row.name}`")
            return replace(row, name=f"{count}x{row.name}", devices=count, device=row.name)
    hint = nearest(name, table())
    if not hint.startswith("did"):
        hint = "devices: " + ", ".join(f"`{known}`" for known, row in table().items() if not row.device)
        hint += "; `llmopt plan 8B` lists the instances"
    raise SettingsError(f"unknown hardware `{name}`", hint=hint)


@cache
def table() -> Mapping[str, Hardware]:
    """Every row by its name: the devices, then the instances."""
    import yaml

    data = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    devices = {name: _device(name, row, data["links"]) for name, row in data["devices"].items()}
    instances = {name: _instance(name, row, devices, data) for name, row in data["instances"].items()}
    return {**devices, **instances}


def instances() -> tuple[Hardware, ...]:
    """What can be rented, in the order of the table."""
    return tuple(row for row in table().values() if row.device)


def _device(name: str, row: Mapping[str, Any], links: Mapping[str, float]) -> Hardware:
    link = row.get("link_gb_s") or links.get(row.get("link", ""))
    peaks = row.get("tflops")
    if peaks is None:  # operations a cycle and core
        peaks = {key: row["cores"] * row["clock_ghz"] * 1e-3 * each for key, each in row["flops_per_cycle"].items()}
    return Hardware(
        name=name,
        kind=row["kind"],
        memory_bytes=round(row["memory_gb"] * 1e9),
        bandwidth_bytes_s=row["bandwidth_gb_s"] * 1e9,
        capability=row.get("capability"),
        flops={key: each * 1e12 for key, each in peaks.items()},
        link_bytes_s=None if link is None else link * 1e9,
        compute_efficiency=row.get("compute_efficiency"),
        source=row["source"],
    )


def _instance(name: str, row: Mapping[str, Any], devices: Mapping[str, Hardware], data: Mapping[str, Any]) -> Hardware:
    device = devices[row["device"]]
    part = row["cores"] / data["devices"][device.name]["cores"] if "cores" in row else 1.0
    return replace(
        device,
        name=name,
        device=device.name,
        devices=row.get("devices", 1),
        memory_bytes=row["memory_gib"] << 30 if "memory_gib" in row else device.memory_bytes,
        bandwidth_bytes_s=part * device.bandwidth_bytes_s,
        flops={key: part * each for key, each in device.flops.items()},
        price_usd_h=row.get("price_usd_h"),
        price_source=data["prices"][row["price"]] if "price" in row else "price not known",
    )


def _multiple(name: str) -> tuple[int | None, str]:
    count, times, rest = name.strip().lower().partition("x")
    return (int(count), rest) if times and count.isdigit() and int(count) > 0 else (None, name)
