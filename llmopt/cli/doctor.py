"""`llmopt doctor`: what this machine is, what is installed, and what llmopt can do here."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import Any

from llmopt.cli import options as opt


def doctor(
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what this machine can do: versions, CPU features, memory, GPUs, targets."""
    import llmopt
    from llmopt.compilers import TARGETS
    from llmopt.pipeline import machine

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    report: dict[str, Any] = {
        "llmopt": llmopt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "store": {"url": session.store.url, **machine.disk(session.store.root)},
        "gpus": machine.gpus(),
        "packages": machine.packages(),
        "targets": machine.targets(TARGETS),
    }
    session.console.result("\n".join(_lines(report)), report)


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    from llmopt.artifacts.disk import byte_size

    cpu, memory, store = report["cpu"], report["memory"], report["store"]
    yield f"llmopt       {report['llmopt']} on Python {report['python']}, {report['platform']}"
    yield f"cpu          {cpu['model']}, {cpu['cores']} cores"
    yield f"             {' '.join(cpu['features']) or 'no features that matter here'}"
    limit = f", limited to {byte_size(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    yield f"memory       {byte_size(memory['available_bytes'])} of {byte_size(memory['total_bytes'])} available{limit}"
    if store["url"] == store["path"]:
        yield f"store        {store['path']}, {byte_size(store['free_bytes'])} free"
    else:
        yield f"store        {store['url']}"
        yield f"             its cache here: {store['path']}, {byte_size(store['free_bytes'])} free"
    gpus = [f"{gpu['name']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}" for gpu in report["gpus"]]
    yield f"gpu          {'; '.join(gpus) or 'none'}"
    for name, version in report["packages"].items():
        yield f"package      {name} {version or 'not installed'}"
    for name, target in report["targets"].items():
        yield f"target       {name}: {target['status']}" + (f" ({target['reason']})" if target["reason"] else "")
