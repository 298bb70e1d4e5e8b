"""`llmopt serve`: an OpenAI-compatible server over an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmopt.cli import options as opt

if TYPE_CHECKING:
    from llmopt.artifacts.store import Store


def serve(
    engine: Annotated[str, opt.argument(metavar="ENGINE")],
    host: Annotated[str, opt.option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, opt.option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    model_name: Annotated[
        str | None,
        opt.option(
            "--model-name", metavar="NAME", help="What clients call the model; by default what ENGINE is called."
        ),
    ] = None,
    max_batch: Annotated[
        int | None, opt.option("--max-batch", metavar="N", help="Sequences computed at once; more wait.")
    ] = None,
    remote: opt.Remote = None,
    verify: opt.Verify = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Serve ENGINE until Ctrl-C, then finish what is in flight: a folder, s3://BUCKET/PREFIX, an artifact id or a name.

    Prints `ready URL` on stdout once it takes requests.
    """
    from llmopt import serve as server
    from llmopt.artifacts.store import Store
    from llmopt.pipeline import inputs

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose, remote=remote, verify=verify)
    store_here = Store.around(Path(engine)) or session.store
    source = inputs.resolve(store_here, engine, session.console.progress)
    inputs.require(source, "serve", "engine")
    server.check(source.path, host, port)

    def ready(url: str) -> None:
        session.console.result(f"ready {url}", {"ready": url, "artifact": source.id, "path": str(source.path)})

    session.console.progress(f"loading {source.label}")
    server.serve(
        source.path,
        host=host,
        port=port,
        model_name=model_name or source.label.rstrip("/").rpartition("/")[2],
        cache_dir=_cache(session, store_here, source.id),
        max_batch=server.MAX_BATCH if max_batch is None else max_batch,
        ready=ready,
    )
    session.console.progress("stopped")


def _cache(session: opt.Session, store: Store, engine: str) -> Path | None:
    """Where the runtime keeps what it compiled for this machine, so that the next start is quicker; None: nowhere."""
    folder = store.root / "cache" / engine.removeprefix("sha256:")[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        session.console.progress(f"every start will compile the engine again: `{folder}`: {error.strerror}")
        return None
    return folder
