"""`llmopt compile`: an engine from a checkpoint, plain or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmopt.cli import options as opt
from llmopt.errors import Exit, SettingsError

if TYPE_CHECKING:
    from llmopt.cli.options import Session


def compile_(
    source: Annotated[str, opt.argument(metavar="SOURCE")],
    profile: opt.Profile = None,
    target: Annotated[
        str | None, opt.option("--target", metavar="T", help="openvino (the default), tensorrt-llm or vllm.")
    ] = None,
    aot: Annotated[
        bool | None, opt.option("--aot/--jit", help="Compile and try the engine here, or when it is first loaded.")
    ] = None,
    lm_head: Annotated[
        str | None, opt.option("--lm-head", metavar="HOW", help="openvino: the output layer: auto, int8 or keep.")
    ] = None,
    activation_group: Annotated[
        int | None,
        opt.option(
            "--activation-group", metavar="G", help="openvino: activations that share an int8 scale; 0: not rounded."
        ),
    ] = None,
    precision: Annotated[
        str | None, opt.option("--precision", metavar="P", help="openvino: of the arithmetic: auto, f32 or bf16.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        opt.option("--kv-cache", metavar="P", help="Keys and values: auto, f32, u8; of a GPU auto, none, fp8, int8."),
    ] = None,
    mode: Annotated[
        str | None, opt.option("--mode", metavar="M", help="tensorrt-llm: engine, bundle, or auto by the version.")
    ] = None,
    runtime_version: Annotated[
        str | None, opt.option("--runtime-version", metavar="V", help="Of TensorRT-LLM or vLLM, where it will run.")
    ] = None,
    gpu: Annotated[
        str | None, opt.option("--gpu", metavar="NAME", help="Where it will run, as `llmopt plan` names it: H100.")
    ] = None,
    tp: Annotated[
        int | None, opt.option("--tp", metavar="N", help="GPUs that share every layer (tensor parallelism).")
    ] = None,
    pp: Annotated[int | None, opt.option("--pp", metavar="N", help="Groups of GPUs that take layers in turn.")] = None,
    max_batch_size: Annotated[
        int | None, opt.option("--max-batch-size", metavar="N", help="Sequences at once.")
    ] = None,
    max_input_len: Annotated[int | None, opt.option("--max-input-len", metavar="N", help="Tokens of a prompt.")] = None,
    max_seq_len: Annotated[
        int | None, opt.option("--max-seq-len", metavar="N", help="Tokens of prompt and completion together.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, opt.option("--max-num-tokens", metavar="N", help="Tokens of one step over all sequences.")
    ] = None,
    emit: Annotated[
        str | None, opt.option("--emit", metavar="NAMES", help="Deployments: lmi, triton, vllm, sagemaker, k8s.")
    ] = None,
    url: Annotated[
        str | None, opt.option("--url", metavar="URL", help="Where the artifact will lie, for deployments: s3://...")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        opt.option(
            "--set",
            envvar="LLMOPT_COMPILE_SET",
            metavar="KEY=VALUE",
            help="Any other setting, as in `build.gemm_plugin=auto`.",
        ),
    ] = None,
    builder: opt.Builder = None,
    timeout: Annotated[
        float | None, opt.option("--timeout", metavar="S", help="Seconds that the build may take.")
    ] = None,
    timing_cache: Annotated[
        str | None, opt.option("--timing-cache", metavar="FILE", help="The `timing.cache` of an earlier build.")
    ] = None,
    resume: Annotated[
        bool, opt.option("--resume", help="SOURCE is a prepared engine: build it here, on its GPU.")
    ] = False,
    validate: Annotated[
        bool, opt.option("--validate", help="SOURCE is a folder prepared for TensorRT-LLM: only check it, strictly.")
    ] = False,
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
    """Compile SOURCE: a model, plain or quantized, as a folder, s3://BUCKET/PREFIX, ORG/NAME[@REVISION], an artifact id
    or a name.

    The engine is an artifact that `llmopt serve` and `llmopt bench` load. Exits with 3 where this machine can only
    prepare it: `--resume` builds what was prepared where its GPU is.
    """
    from llmopt.cli.deliver import Delivery
    from llmopt.pipeline import inputs, plan

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
    given = {
        "target": target,
        "aot": aot,
        "lm_head": lm_head,
        "activation_group": activation_group,
        "precision": precision,
        "kv_cache": kv_cache,
        "mode": mode,
        "version": runtime_version,
        "gpu": gpu,
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
        "max_batch_size": max_batch_size,
        "max_input_len": max_input_len,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
        "emit": None if emit is None else emit.split(","),
        "url": url,
    }
    if validate or resume:
        _refuse_settings("--validate" if validate else "--resume", profile, given, overrides)
    if validate:
        beside = {
            "resume": resume or None,
            "builder": builder,
            "timeout": timeout,
            "timing-cache": timing_cache,
            "out": out,
            "name": name,
        }
        _refuse_beside_validate(beside)
        return _validate(session, source)
    delivery = Delivery(session, out=out, name=name)
    with_builder = opt.builder(builder, timeout_s=timeout, timing_cache=timing_cache)
    if resume:
        if with_builder is None:
            raise SettingsError(
                "`--resume` needs to know what builds", hint="`--builder PYTHON` with tensorrt_llm, or `docker:IMAGE`"
            )
        prepared = inputs.resolve(session.store, source, session.console.progress, deny=deny_license or ())
        inputs.refuse_denied((prepared,), deny_license or ())
        result = plan.build_engine(session.store, prepared, with_builder, session.console.progress)
    else:
        settings = opt.overridden(opt.settings(profile, "compile", **given), overrides)
        model = inputs.model(session.store, source, session.console.progress, deny=deny_license or ())
        result = plan.compile_model(session.store, model, settings, session.console.progress, builder=with_builder)
    delivery.deliver(result)
    return int(Exit.BACKEND_MISSING if result.status == "prepared" else Exit.OK)


def _refuse_settings(flag: str, profile: str | None, given: dict[str, Any], overrides: list[str] | None) -> None:
    """What was prepared carries its settings; one that is given beside it would be silently without effect."""
    names = [name for name, value in given.items() if value is not None]
    if profile is not None or names or overrides:
        what = "--profile" if profile is not None else f"--set {overrides[0]}" if overrides else names[0]
        raise SettingsError(
            f"`{flag}` takes no settings, and `{what}` is one", hint="what was prepared has its settings in itself"
        )


def _refuse_beside_validate(given: dict[str, Any]) -> None:
    found = next((name for name, value in given.items() if value is not None), None)
    if found is not None:
        raise SettingsError(
            f"`--validate` makes nothing, and `--{found}` says what to make", hint="leave one of them out"
        )


def _validate(session: Session, source: str) -> int:
    """Check what was prepared for TensorRT-LLM, by whomever: its weights first, which says more than a digest does."""
    from llmopt.artifacts.manifest import MANIFEST_NAME
    from llmopt.artifacts.objects import is_s3
    from llmopt.compilers.trt_llm.validate import validate
    from llmopt.pipeline import inputs

    folder = Path(source)
    if is_s3(source) or (not folder.is_dir() and "/" not in source):
        folder = inputs.resolve(session.store, source, session.console.progress).path
    report = validate(folder)
    if (folder / MANIFEST_NAME).is_file() and not is_s3(source):
        inputs.resolve(session.store, source)
    session.console.result("\n".join(report.lines()), {"folder": str(folder), **report.to_json()})
    return int(Exit.OK)
