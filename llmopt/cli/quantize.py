"""`llmopt quantize`: a quantized model from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from llmopt.cli import options as opt
from llmopt.errors import Exit, SettingsError

if TYPE_CHECKING:
    from llmopt.pipeline.inputs import Input


def quantize(
    model: Annotated[str, opt.argument(metavar="MODEL")],
    profile: opt.Profile = None,
    method: Annotated[
        str | None,
        opt.option("--method", metavar="M", help="gptq (the default), awq, smoothquant, rtn, fp8 or convert."),
    ] = None,
    bits: Annotated[int | None, opt.option("--bits", metavar="N", help="2 to 8.")] = None,
    group_size: Annotated[
        int | None, opt.option("--group-size", metavar="G", help="Weights that share a scale; -1: a whole row.")
    ] = None,
    symmetric: Annotated[
        bool | None, opt.option("--symmetric/--asymmetric", help="Without zero points, or with.")
    ] = None,
    act_order: Annotated[
        bool | None, opt.option("--act-order/--no-act-order", help="gptq: columns of large activations first.")
    ] = None,
    damping: Annotated[
        float | None,
        opt.option("--damping", metavar="X", help="gptq: added to the Hessian, as a share of its mean."),
    ] = None,
    compensate: Annotated[
        bool | None,
        opt.option("--compensate/--no-compensate", help="gptq: make up for the blocks before (twice the time)."),
    ] = None,
    sweeps: Annotated[
        int | None, opt.option("--sweeps", metavar="N", help="gptq, awq: refinements after the rounding.")
    ] = None,
    scaling: Annotated[
        str | None,
        opt.option("--scaling", metavar="S", help="gptq: scale the input channels first: awq, smoothquant or none."),
    ] = None,
    grid: Annotated[int | None, opt.option("--grid", metavar="N", help="awq: exponents tried for the scales.")] = None,
    clip: Annotated[
        bool | None, opt.option("--clip/--no-clip", help="awq: search a smaller range for each group.")
    ] = None,
    alpha: Annotated[
        str | None,
        opt.option("--alpha", metavar="X", help="smoothquant: share of the difficulty moved to weights, or search."),
    ] = None,
    activations: Annotated[
        str | None,
        opt.option("--activations", metavar="A", help="8-bit inputs: dynamic, static or none; not for awq."),
    ] = None,
    weights: Annotated[
        str | None, opt.option("--weights", metavar="W", help="fp8: one scale a channel, or one a tensor.")
    ] = None,
    kv_cache: Annotated[
        str | None, opt.option("--kv-cache", metavar="K", help="Calibrate scales for a cache in fp8 or int8.")
    ] = None,
    override: Annotated[
        list[str] | None,
        opt.option("--override", metavar="P=S", help="Settings of some linears: '*.down_proj=bits:8,group_size:32'."),
    ] = None,
    skip: Annotated[
        list[str] | None, opt.option("--skip", metavar="P", help="Linears to leave as they are: '*.layers.0.*'.")
    ] = None,
    target_bpw: Annotated[
        float | None, opt.option("--target-bpw", metavar="X", help="Choose the bits of each linear to meet this mean.")
    ] = None,
    target_bits: Annotated[
        str | None, opt.option("--target-bits", metavar="N,N", help="Bits to choose from: 4,8 for vLLM's kernels.")
    ] = None,
    format: Annotated[
        str | None, opt.option("--format", metavar="F", help="compressed-tensors (the default), gptq, awq, modelopt.")
    ] = None,
    calib: Annotated[
        str | None,
        opt.option(
            "--calib",
            metavar="REF",
            help="Text, .jsonl, .parquet, datasets:ORG/NAME[@REV][:SPLIT] or calibration artifact, instead of the"
            " package's text.",
        ),
    ] = None,
    calib_field: Annotated[
        str | None,
        opt.option("--calib-field", metavar="NAME", help="Field of its rows: a text, or messages of a chat."),
    ] = None,
    adapter: Annotated[
        str | None,
        opt.option("--adapter", metavar="DIR", help="LoRA adapter to merge first: a PEFT folder, or ORG/NAME."),
    ] = None,
    samples: Annotated[int | None, opt.option("--samples", metavar="N", help="Calibration sequences.")] = None,
    seq_len: Annotated[int | None, opt.option("--seq-len", metavar="L", help="Tokens in each of them.")] = None,
    seed: opt.Seed = None,
    lm_head: Annotated[bool | None, opt.option("--lm-head/--no-lm-head", help="Quantize the output layer too.")] = None,
    precision: Annotated[
        str | None,
        opt.option("--precision", metavar="P", help="auto (BF16 where the machine has it) or float32."),
    ] = None,
    memory_budget: Annotated[
        str | None,
        opt.option("--memory-budget", metavar="SIZE", help="8GiB, say: what goes past it lies in files meanwhile."),
    ] = None,
    resume: Annotated[
        bool, opt.option("--resume/--no-resume", help="Go on from what an interrupted run finished [default].")
    ] = True,
    check: Annotated[
        str | None,
        opt.option(
            "--check",
            metavar="ARTIFACT",
            help="Only quantize one random block of it again and compare: exit 4 if other.",
        ),
    ] = None,
    deny_license: opt.DenyLicense = None,
    out: opt.Out = None,
    name: opt.Name = None,
    sign_key: opt.SignKey = None,
    remote: opt.Remote = None,
    push: opt.Push = False,
    verify: opt.Verify = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    json_lines: opt.JsonLines = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> int:
    """Quantize MODEL: a checkpoint in a folder or at s3://BUCKET/PREFIX, ORG/NAME[@REVISION] of the Hugging Face hub,
    an artifact id or a name.

    The result is an artifact in the store; the same inputs and settings give it again without any work.
    """
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, plan, runner

    session = opt.session(
        store,
        json=json,
        json_lines=json_lines,
        quiet=quiet,
        verbose=verbose,
        sign_key=sign_key,
        remote=remote,
        push=push,
        verify=verify,
    )
    delivery = Delivery(session, out=out, name=name)
    denied = deny_license or ()
    source = inputs.model(session.store, model, session.console.progress, deny=denied)
    memory = opt.byte_size("--memory-budget", memory_budget)
    if check is not None:
        return _check(session, source, check, adapter, memory)
    settings = opt.settings(
        profile,
        "quantize",
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=damping,
        compensate=compensate,
        sweeps=sweeps,
        scaling=scaling,
        grid=grid,
        clip=clip,
        alpha=_number_or_text(alpha),
        activations=activations,
        weights=weights,
        kv_cache=kv_cache,
        target_bpw=target_bpw,
        target_bits=opt.integers("--target-bits", target_bits),
        format=format,
        calib=calib,
        calib_field=calib_field,
        adapter=adapter,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        lm_head=lm_head,
        precision=precision,
    )
    own = _overrides(override or [], skip or [])
    if own:
        inherited = dict(settings.get("overrides", {}))
        settings["overrides"] = {key: value for key, value in inherited.items() if key not in own} | own
    stage = plan.quantize_stage(
        session.store, source, settings, session.console.progress, memory_bytes=memory, deny=denied
    )
    if not resume:
        session.store.forget(stage.action.key)
    delivery.deliver(runner.run(session.store, stage, session.console.progress))
    return int(Exit.OK)


def _check(session: opt.Session, source: Input, artifact: str, adapter: str | None, memory_bytes: int | None) -> int:
    """Quantize one block of an artifact again; the settings are those of its manifest."""
    from llmopt.pipeline import inputs
    from llmopt.pipeline.check import check_quantized

    merged = None if adapter is None else inputs.adapter(adapter, session.console.progress)
    checked = check_quantized(
        session.store,
        source,
        inputs.resolve(session.store, artifact).id,
        session.console.progress,
        adapter=merged,
        memory_bytes=memory_bytes,
    )
    lines = [f"block {checked.block} of {checked.blocks} came out {'other' if checked.differing else 'the same'}"]
    lines += [f"other: {name}" for name in checked.differing]
    lines += [f"not as it was: {line}" for line in checked.otherwise]
    session.console.result("\n".join(lines), checked.to_json())
    return int(Exit.VERIFICATION_FAILED if checked.differing else Exit.OK)


def _overrides(texts: list[str], skipped: list[str]) -> dict[str, Any]:
    """`PATTERN=bits:8,group_size:32` and the patterns to skip, which count more, as a profile has them."""
    from llmopt.profiles import parse_value

    found: dict[str, Any] = {}
    for text in texts:
        pattern, _, settings = text.partition("=")
        values = parse_value(f"{{{settings.replace(':', ': ')}}}")
        if not pattern or not settings or None in values.values():
            raise SettingsError(
                f"`--override {text}` is not `PATTERN=SETTING:VALUE`",
                hint="for example `--override '*.down_proj=bits:8,group_size:32'`",
            )
        found[pattern] = values
    return found | {pattern: {"skip": True} for pattern in skipped}


def _number_or_text(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
