"""What the server and its machine told during a load: `/metrics`, the GPUs by NVML, the CPUs' energy by RAPL.

A thread of its own asks at the beginning, at the end and now and then between, seldom enough not to disturb the load.
What there is not is said in `missing`, with its reason, and never ends a load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from llmopt.artifacts.outcome import Json
from llmopt.bench.metrics import prometheus

INTERVAL_S = 2.0
_TIMEOUT_S = 2.0
_RAPL = Path("/sys/class/powercap")
_MAX_BYTES = 8 << 20

#: Gives figures by name, now.
Source: TypeAlias = Callable[[], Mapping[str, float]]

_COUNTERS = {name for name, figure in prometheus.FIGURES.items() if figure.counter} | {"cpu_energy_j"}


class MissingError(Exception):
    """Why a source has nothing to tell."""


@dataclass(slots=True)
class Watch:
    """What was told so far; complete when the watching has ended."""

    samples: int = 0
    gauges: dict[str, list[float]] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """One reading of all sources. A counter that fell has begun anew at 0."""
        self.samples += 1
        for name, value in figures.items():
            if name in _COUNTERS:
                before = self._last.get(name, value)
                self.counters[name] = self.counters.get(name, 0.0) + (value - before if value >= before else value)
                self._last[name] = value
            else:
                self.gauges.setdefault(name, []).append(value)

    def result(self) -> dict[str, Json]:
        """Of gauges mean, least and most, of counters their growth."""
        found: dict[str, Json] = {"samples": self.samples}
        for name, values in sorted(self.gauges.items()):
            found[name] = {
                "mean": round(sum(values) / len(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)
            }  # fmt: skip
        found |= {name: round(value, 3) for name, value in sorted(self.counters.items())}
        found["missing"] = dict(self.missing)
        return _with_shares(found)


@contextmanager
def watching(
    metrics_urls: Sequence[str],
    *,
    machine: bool,
    headers: Iterable[tuple[str, str]] = (),
    interval_s: float = INTERVAL_S,
) -> Iterator[Watch]:
    """Watch the servers' `/metrics`, and with `machine` this machine's GPUs and CPUs, while the block runs."""
    watch = Watch()
    sources: dict[str, Source] = {}
    if metrics_urls:
        sources["metrics"] = Scrape(tuple(metrics_urls), dict(headers))
    if machine:
        for name, opened in (("gpu", open_gpus), ("cpu_energy", open_rapl)):
            try:
                sources[name] = opened()
            except MissingError as error:
                watch.missing[name] = str(error)
    _sample(watch, sources, first=True)
    stop = threading.Event()
    thread = threading.Thread(target=_poll, args=(watch, sources, stop, interval_s), name="telemetry", daemon=True)
    told = sources.keys() - watch.missing.keys()
    if told:
        thread.start()
    try:
        yield watch
    finally:
        stop.set()
        if told:
            thread.join()


def metrics_url(server_url: str, endpoint: str) -> str:
    """Where a server's metrics are: at the root of its address; Triton has them at port 8002."""
    parts = urlsplit(server_url)
    host = f"{parts.hostname}:8002" if endpoint == "triton" else parts.netloc
    return urlunsplit((parts.scheme, host, "/metrics", "", ""))


def merged(results: Sequence[Mapping[str, Json] | None]) -> dict[str, Json] | None:
    """The tellings of several rounds as one; None where a round has none."""
    if not results or any(result is None for result in results):
        return None
    known = [dict(result) for result in results if result is not None]
    found: dict[str, Json] = {"samples": sum(_number(result.get("samples")) for result in known)}
    for name in sorted({name for result in known for name in result} - {"samples", "missing"}):
        values = [(result[name], _number(result.get("samples"))) for result in known if name in result]
        first = values[0][0]
        if isinstance(first, dict):
            gauges = [(value, weight) for value, weight in values if isinstance(value, dict)]
            total = sum(weight for _, weight in gauges) or 1.0
            found[name] = {
                "mean": round(sum(_number(value["mean"]) * weight for value, weight in gauges) / total, 4),
                "min": min(_number(value["min"]) for value, _ in gauges),
                "max": max(_number(value["max"]) for value, _ in gauges),
            }
        elif len(values) == len(known):
            found[name] = round(sum(_number(value) for value, _ in values), 3)
    missing: dict[str, Json] = {}
    for result in known:
        reasons = result.get("missing")
        missing |= reasons if isinstance(reasons, dict) else {}
    return _with_shares(found | {"missing": missing})


def _with_shares(found: dict[str, Json]) -> dict[str, Json]:
    """With what is computed of the sums."""
    queries = _number(found.get("prefix_cache_queries"))
    if queries and "prefix_cache_hits" in found:
        found["prefix_cache_hit_share"] = round(_number(found["prefix_cache_hits"]) / queries, 4)
    energies = [_number(found[name]) for name in ("cpu_energy_j", "gpu_energy_j") if found.get(name) is not None]
    found["energy_j"] = round(sum(energies), 3) if energies else None
    return found


def _number(value: Json) -> float:
    return value if isinstance(value, (int, float)) else 0.0


def _poll(watch: Watch, sources: Mapping[str, Source], stop: threading.Event, interval_s: float) -> None:
    while not stop.wait(interval_s):
        _sample(watch, sources)
    _sample(watch, sources)


def _sample(watch: Watch, sources: Mapping[str, Source], *, first: bool = False) -> None:
    """Ask every source that has not failed at the first asking."""
    figures: dict[str, float] = {}
    for name, source in sources.items():
        if name in watch.missing:
            continue
        try:
            figures |= source()
        except MissingError as error:
            if first:
                watch.missing[name] = str(error)
    if figures:
        watch.add(figures)


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of servers that share a load, as one."""

    urls: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self) -> Mapping[str, float]:
        found = prometheus.read("\n".join(self._fetch(url) for url in self.urls))
        if not found:
            raise MissingError("no metric that is known here")
        return found

    def _fetch(self, url: str) -> str:
        from http.client import HTTPConnection, HTTPException, HTTPSConnection

        parts = urlsplit(url)
        connection = (HTTPSConnection if parts.scheme == "https" else HTTPConnection)(parts.netloc, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", parts.path, headers=dict(self.headers))
            response = connection.getresponse()
            data = response.read(_MAX_BYTES)
        except (OSError, HTTPException, ValueError) as error:
            raise MissingError(f"cannot be read: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise MissingError(f"HTTP {response.status}")
        return data.decode("utf-8", errors="replace")


def open_gpus() -> Source:
    """NVIDIA's GPUs of this machine: shares and temperatures of the busiest and warmest, sums of the rest."""
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingError("`nvidia-ml-py` is not installed") from None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise MissingError(f"NVML: {error}") from None
    if not handles:
        raise MissingError("NVML knows no GPU")
    return lambda: read_gpus(pynvml, handles)


def read_gpus(nvml: Any, handles: Sequence[Any]) -> dict[str, float]:
    """What the GPUs tell; a figure that one of them does not know is left out."""
    asked: dict[str, tuple[Callable[[Any], float], Callable[[Iterable[float]], float]]] = {
        "gpu_memory_bytes": (lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used, sum),
        "gpu_share": (lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100, max),
        "gpu_power_w": (lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, sum),
        "gpu_temperature_c": (lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU), max),
        "gpu_energy_j": (lambda gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3, sum),
    }
    found = {}
    for name, (read, together) in asked.items():
        try:
            found[name] = float(together([read(gpu) for gpu in handles]))
        except nvml.NVMLError:
            continue
    return found


def open_rapl(folder: Path = _RAPL) -> Source:
    """The energy of this machine's CPU packages."""
    packages = [place for place in folder.glob("intel-rapl:*") if place.name.count(":") == 1]
    if not packages:
        raise MissingError("this machine has no RAPL counters")
    rapl = _Rapl(packages)
    rapl()
    return rapl


class _Rapl:
    """Counters of microjoules that begin anew behind their range."""

    def __init__(self, packages: Sequence[Path]) -> None:
        self._packages = packages
        self._last_uj: dict[Path, int] = {}
        self._total_uj = 0

    def __call__(self) -> Mapping[str, float]:
        try:
            for package in self._packages:
                now_uj = int((package / "energy_uj").read_text())
                grown_uj = now_uj - self._last_uj.get(package, now_uj)
                if grown_uj < 0:
                    grown_uj += int((package / "max_energy_range_uj").read_text())
                self._last_uj[package] = now_uj
                self._total_uj += grown_uj
        except PermissionError:
            raise MissingError("only the administrator may read the RAPL counters") from None
        except (OSError, ValueError) as error:
            raise MissingError(f"RAPL: {error}") from None
        return {"cpu_energy_j": self._total_uj / 1e6}
