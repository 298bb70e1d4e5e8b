"""What happens with a stage's result: printed, named, copied out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifacts.disk import byte_size
from llmopt.artifacts.export import check_out
from llmopt.artifacts.layout import check_name
from llmopt.artifacts.objects import is_s3
from llmopt.artifacts.outcome import Json, Progress
from llmopt.cli import prepared, summary

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store
    from llmopt.cli.options import Session
    from llmopt.pipeline.runner import StageResult


class Delivery:
    """Made before the work, so that a folder or a name that cannot be used is found before it and not after."""

    def __init__(self, session: Session, *, out: str | None, name: str | None, anew: bool = False) -> None:
        """`anew`: the work gives a new artifact each time, as a measurement does."""
        self._session, self._name = session, name
        self._out = out
        if out is not None:
            check_destination(out, anew=anew)
        if name is not None:
            check_name(name)

    def deliver(self, result: StageResult, figures: str | None = None, more: Mapping[str, Json] | None = None) -> None:
        """Name and copy the artifact as asked, then print the result.

        `figures` is the text for its metrics, if given; `more` is put beside the result for `--json`.
        """
        if result.status == "prepared":
            more = {**(more or {}), **prepared.about(result)}
            figures = prepared.text(result, more)
        store = self._session.store
        if self._name is not None:
            store.set_name(self._name, result.artifact)
        if self._out is not None:
            copy_to(store, result.artifact, self._out, self._session.console.progress)
        self._session.console.result(
            "\n".join(_lines(result, self._name, figures)), {**result.to_json(), **(more or {})}
        )

    def keep(self, staged: Path) -> None:
        """What a measurement that ended early has written goes to `--out`, or into a temporary folder."""
        folder = None if self._out is None or is_s3(self._out) else Path(self._out)
        keep_report(staged, folder, self._session.console.progress)


def check_destination(out: str, *, anew: bool = False) -> None:
    """Refuse, before any work, a folder or a prefix of a bucket that an artifact could not be copied to."""
    if is_s3(out):
        from llmopt.artifacts.remote import plain

        plain.check_out(out, anew=anew)
    else:
        check_out(Path(out), anew=anew)


def copy_to(store: Store, artifact: str, out: str, progress: Progress) -> None:
    """To a folder, or file by file to a prefix of a bucket, without a copy on this disk."""
    if is_s3(out):
        from llmopt.artifacts.remote import plain

        plain.write(store, artifact, out, progress)
    else:
        store.export(artifact, Path(out))


def keep_report(staged: Path, out: Path | None, progress: Progress) -> None:
    """Copy what there is of a report, as it is no artifact without a manifest. Raises nothing: an error is on its way.

    A folder with something in it, an artifact that was exported before, is left as it is. Without `out`, measurements
    go into a temporary folder, since they cannot be had again.
    """
    import shutil
    import tempfile

    try:
        if not any(staged.iterdir()):
            return
        if out is None:
            if not (staged / "requests.parquet").is_file():
                return
            out = Path(tempfile.mkdtemp(prefix="llmopt-bench-"))
        if out.exists() and any(out.iterdir()):
            progress(f"the unfinished report is not kept: `{out}` is not empty")
            return
        shutil.copytree(staged, out, dirs_exist_ok=True)
    except OSError as error:
        progress(f"the unfinished report could not be kept in `{out}`: {error.strerror or error}")
    else:
        progress(f"the unfinished report is in `{out}`")


def _lines(result: StageResult, name: str | None, figures: str | None) -> Iterator[str]:
    """What a stage came to, for people."""
    took = "cached" if result.cached else f"{result.seconds:.1f} s"
    yield f"artifact  {result.artifact}" + (f" ({name})" if name else "")
    yield f"kind      {result.kind}, {result.status}, {byte_size(result.bytes)}, {took}"
    if result.license is not None:
        yield f"license   {result.license}"
    yield f"path      {result.path}"
    shown: frozenset[str] = frozenset()
    if figures is not None:
        shown = frozenset(result.metrics)
        yield from ("", figures, "")
    if result.kind == "quantized-model" and (table := summary.quantized(result.metrics)):
        shown = summary.QUANTIZED
        yield from ("", table, "")
    for key, value in _flat({key: value for key, value in result.metrics.items() if key not in shown}):
        yield f"{key}: {value}"
    for event in result.events:
        yield f"note: {event}"
    if not result.reproducible:
        yield "note: not reproducible: the same action has given different results"


def _flat(metrics: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Nested figures by their dotted names."""
    if not isinstance(metrics, dict):
        yield prefix, metrics
        return
    for key, value in metrics.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else key)
