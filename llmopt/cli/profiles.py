"""`llmopt profiles`: the settings that come with the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmopt.cli import options as opt
from llmopt.cli.tables import table

app = typer.Typer(name="profiles", help="List and show profiles: settings by name.")


@app.command("ls")
def list_profiles(
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """List the profiles that come with the package, and the workloads of `llmopt bench --workload`."""
    from llmopt.bench.workload import spec
    from llmopt.profiles import load, shipped

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    found = [load(name) for name in shipped()]
    workloads = {name: spec.resolve(name) for name in spec.shipped()}
    rows = [["NAME", "STAGES", "DESCRIPTION"], *([p.name, " ".join(p.sections), p.description] for p in found)]
    rows += [[name, "workload", workload.description] for name, workload in workloads.items()]
    described = [{"name": p.name, "stages": list(p.sections), "description": p.description} for p in found]
    sent = [{"name": name, "description": workload.description} for name, workload in workloads.items()]
    session.console.result(table(rows, left=3), {"profiles": described, "workloads": sent})


@app.command("show")
def show(
    profile: Annotated[str, opt.argument(metavar="PROFILE")],
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show PROFILE (shipped, or a YAML file) with what it extends and every default of its stages; or a workload."""
    import yaml

    from llmopt.bench.workload import spec
    from llmopt.profiles.settings import to_json

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    values = {"name": profile, **to_json(spec.resolve(profile))} if profile in spec.shipped() else _stages(profile)
    session.console.result(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), values)


def _stages(profile: str) -> dict[str, Any]:
    from llmopt.pipeline.plan import resolved
    from llmopt.profiles import load

    found = load(profile)
    values: dict[str, Any] = {"name": found.name, "description": found.description}
    if found.model is not None:
        values["model"] = found.model
    return values | {section: resolved(found, section) for section in found.sections}
