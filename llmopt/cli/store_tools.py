"""What `llmopt store` tells of artifacts beyond their manifests: what they were made from, and what separates two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from llmopt.cli import options as opt

_FIGURES = 8  # of an artifact in a tree


def diff(
    first: Annotated[str, opt.argument(metavar="A")],
    second: Annotated[str, opt.argument(metavar="B")],
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what separates artifact B from artifact A: how they were made, what was measured, and their files."""
    from llmopt.cli.references import resolve
    from llmopt.pipeline.differences import differences

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    value = differences(session.store, *(resolve(session.store, each) for each in (first, second)))
    session.console.result("\n".join(diff_lines(value)), value)


def diff_lines(value: Mapping[str, Any]) -> Iterator[str]:
    yield f"a         {value['a']}"
    yield f"b         {value['b']}"
    if value["same"]:
        yield "the same artifact"
        return
    for name in ("kind", "status", "op", "op_version", "code"):
        if value[name] is not None:
            yield f"{name:<9} {_pair(value[name])}"
    for part in ("inputs", "settings", "deps", "target"):
        yield from (f"{part:<9} {name}: {_pair(pair)}" for name, pair in value[part].items())
    for name, pair in value["metrics"].items():
        ratio = f", x {pair['ratio']:.4g}" if pair.get("ratio") is not None else ""
        difference = f"  ({pair['difference']:+.6g}{ratio})" if "difference" in pair else ""
        yield f"metric    {name}: {_pair(pair)}{difference}"
    for sign, what in (("-", "removed"), ("+", "added")):
        yield from (f"event     {sign} {event}" for event in value["events"][what])
    files = value["files"]
    for sign, what in (("-", "removed"), ("+", "added")):
        yield from (f"file      {sign} {file['path']}, {file['bytes']} bytes" for file in files[what])
    for file in files["changed"]:
        yield f"file      ~ {file['path']}, {file['a']} -> {file['b']} bytes"
        yield from (f"            {name}: {_pair(pair)}" for name, pair in file.get("keys", {}).items())
        if file.get("more_keys"):
            yield f"            and {file['more_keys']} more"


def tree_lines(node: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """An artifact and, further in, what it was made from."""
    role = f"{node['input']}: " if node["input"] else ""
    id_ = str(node["id"])
    parts = [role + (id_[:19] if id_.startswith("sha256:") else id_), str(node["kind"])]
    parts += [str(part) for part in (node["op"], node["source"], node["license"]) if part is not None]
    if not node["stored"]:
        parts.append("not in the store")
    if node.get("again"):
        parts.append("as above")
    yield "  " * depth + ", ".join(parts)
    figures = list(node["metrics"].items())[:_FIGURES] if not node.get("again") else []
    yield from ("  " * depth + f"    {name}: {_short(figure)}" for name, figure in figures)
    for below in node["inputs"]:
        yield from tree_lines(below, depth + 1)


def _pair(pair: Mapping[str, Any]) -> str:
    return f"{_short(pair['a'])} -> {_short(pair['b'])}"


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    if text.startswith("sha256:"):
        return text[:19]
    return text if len(text) <= 80 else text[:77] + "..."
