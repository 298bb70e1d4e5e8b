"""`llmopt compile`: an engine from a checkpoint, plain or quantized."""

from __future__ import annotations

from typing import Annotated

from llmopt.cli import options as opt
from llmopt.errors import Exit


def compile_(
    source: Annotated[str, opt.argument(metavar="SOURCE")],
    profile: opt.Profile = None,
    target: Annotated[str | None, opt.option("--target", metavar="T", help="openvino (the default).")] = None,
    aot: Annotated[
        bool | None, opt.option("--aot/--jit", help="Compile and try the engine here, or when it is first loaded.")
    ] = None,
    lm_head: Annotated[
        str | None, opt.option("--lm-head", metavar="HOW", help="The output layer: auto, int8 or keep.")
    ] = None,
    activation_group: Annotated[
        int | None,
        opt.option("--activation-group", metavar="G", help="Activations that share an int8 scale; 0: not rounded."),
    ] = None,
    precision: Annotated[
        str | None, opt.option("--precision", metavar="P", help="Of the arithmetic: auto, f32 or bf16.")
    ] = None,
    kv_cache: Annotated[
        str | None, opt.option("--kv-cache", metavar="P", help="Of keys and values: auto, f32 or u8.")
    ] = None,
    out: opt.Out = None,
    name: opt.Name = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Compile SOURCE: a model, plain or quantized, as a folder, ORG/NAME[@REVISION], an artifact id or a name.

    The engine is an artifact that `llmopt serve` and `llmopt bench` load. Exits with 3 where this machine can only
    prepare it.
    """
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, runner, stages

    session = opt.session(store, json=json, json_lines=json_lines, quiet=quiet, verbose=verbose)
    delivery = Delivery(session, out=out, name=name)
    model = inputs.model(session.store, source, session.console.progress)
    settings = opt.settings(
        profile,
        "compile",
        target=target,
        aot=aot,
        lm_head=lm_head,
        activation_group=activation_group,
        precision=precision,
        kv_cache=kv_cache,
    )
    result = runner.run(session.store, stages.compile_(model, settings), session.console.progress)
    delivery.deliver(result)
    return int(Exit.BACKEND_MISSING if result.status == "prepared" else Exit.OK)
