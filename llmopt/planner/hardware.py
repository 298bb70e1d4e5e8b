"""The table of hardware: what a GPU, a CPU or a cloud instance can hold, move and compute. Data in hardware.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import SettingsError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device, or one cloud instance with several of them.

    memory_bytes and bandwidth_bytes_s are of one device. capability: the CUDA compute capability, "9.0".
    """

    name: str
    kind: str  # "gpu" or "cpu"
    memory_bytes: int
    bandwidth_bytes_s: float
    capability: str | None = None
    devices: int = 1

    @property
    def architecture(self) -> str | None:
        """As TensorRT-LLM's builds name it: "sm_90"."""
        return None if self.capability is None else "sm_" + self.capability.replace(".", "")


_TABLE = {
    "H100": Hardware(name="H100", kind="gpu", memory_bytes=80 * 10**9, bandwidth_bytes_s=3.35e12, capability="9.0"),
}


def find(name: str) -> Hardware:
    """The row of a device or an instance, whatever the case of `name`; SettingsError with the nearest name."""
    for known, row in _TABLE.items():
        if known.lower() == name.lower():
            return row
    raise SettingsError(f"unknown hardware `{name}`", hint=nearest(name, _TABLE))
