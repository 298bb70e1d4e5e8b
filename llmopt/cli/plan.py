"""`llmopt plan`: what fits where, how fast it would be and what it would cost."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from llmopt.cli import options as opt
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.planner.choose import Limit, Option
    from llmopt.planner.hardware import Hardware
    from llmopt.planner.roofline import Workload
    from llmopt.planner.shape import ModelShape


def plan(
    model: Annotated[str, opt.argument(metavar="MODEL")],
    hardware: Annotated[
        str | None,
        opt.option(
            "--hardware",
            metavar="H[,H]",
            help="Instances or devices (`g5.48xlarge`, `H100`, `4xL40S`), or `here`: this machine's CPU, measured "
            "[default: every instance of the table].",
        ),
    ] = None,
    workload: Annotated[
        str | None,
        opt.option("--workload", metavar="W", help="Of `llmopt bench` (`chat`, `rag`, ...), for its lengths."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, opt.option("--prompt-tokens", metavar="N", help="Of a request [default: 1024].", min=1)
    ] = None,
    output_tokens: Annotated[
        int | None, opt.option("--output-tokens", metavar="N", help="Of an answer [default: 256].", min=1)
    ] = None,
    concurrency: Annotated[
        int | None,
        opt.option("--concurrency", metavar="N", help="Requests in flight [default: as many as fit].", min=1),
    ] = None,
    slo: Annotated[
        list[str] | None,
        opt.option("--slo", metavar="LIMIT", help='For example "ttft_p99_ms<=200"; may be given again.'),
    ] = None,
    precision: Annotated[
        str | None,
        opt.option("--precision", metavar="P[,P]", help="Of fp32, fp16, fp8, int8, w4a16 [default: all]."),
    ] = None,
    kv_cache: Annotated[
        str | None, opt.option("--kv-cache", metavar="P", help="fp16, fp8 or int8 [default: the runtime's].")
    ] = None,
    tp: Annotated[
        int | None, opt.option("--tp", metavar="N", help="Devices that share a model [default: what is best].", min=1)
    ] = None,
    price: Annotated[
        list[str] | None,
        opt.option("--price", metavar="[H=]USD", help="Of an hour, instead of the table's; may be given again."),
    ] = None,
    store: opt.StoreFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what fits where for MODEL, how fast it would be and what it would cost. Nothing is loaded or run.

    MODEL is a folder, s3://BUCKET/PREFIX, a config.json, ORG/NAME of the hub, an artifact, or a number of parameters:
    `70B`.
    """
    from llmopt.artifacts.objects import is_s3
    from llmopt.planner import choose, shape
    from llmopt.planner import precision as precisions

    session = opt.session(store, json=json, quiet=quiet, verbose=verbose)
    limits = _limits(slo or [])
    of_model = _of_prefix(model) if is_s3(model) else shape.read(_located(session, model))
    wanted = _workload(workload, prompt_tokens, output_tokens, concurrency, of_model.max_positions)
    rows = _rows(hardware, price or [], session)
    kinds = [precisions.find(name) for name in _list(precision)] or list(precisions.PRECISIONS.values())
    on_disk = None if precision is not None else precisions.stored(of_model)
    found = choose.options(
        of_model,
        rows,
        [*([] if on_disk is None else [on_disk]), *kinds],
        workload=wanted,
        limits=limits,
        kv_precision=kv_cache,
        tensor_parallel=tp,
    )
    chosen = choose.best(found)
    text = "\n".join(_text(of_model, wanted, limits, found, chosen, each_precision=hardware is not None))
    session.console.result(text, _report(of_model, wanted, limits, found, chosen))


def _of_prefix(url: str) -> ModelShape:
    """By the configuration alone of what lies below a prefix of a bucket."""
    from llmopt.artifacts.remote.plain import Prefix
    from llmopt.planner import shape

    with Prefix.open(url).small(("config.json", "hf_quant_config.json")) as folder:
        if not (folder / "config.json").is_file():
            raise LlmoptError(f"no `config.json` lies at `{url}`", hint="give the prefix that has it directly below it")
        return shape.read(str(folder))


def _located(session: opt.Session, model: str) -> str:
    """A path for the name of an artifact, or of a model of the hub (its config.json is fetched); others as given."""
    from pathlib import Path

    from llmopt.planner import shape

    if Path(model).exists() or shape.parameter_count(model) is not None:
        return model
    from llmopt.pipeline import hub, inputs

    if re.fullmatch(r"[\d.]{1,7}[a-zA-Z]?", model) and session.store.resolve(model) is None:
        raise SettingsError(f"`{model}` is no number of parameters", hint="with its unit, for example `70B`")
    wanted = None if model.startswith((".", "~", "/")) else hub.Reference.parse(model)
    if wanted is not None and wanted.kind == "model":
        return str(hub.fetch_config(wanted, session.console.progress))
    return model if "/" in model else str(inputs.resolve(session.store, model).path)


def _limits(texts: Sequence[str]) -> list[Limit]:
    from llmopt.bench.gate import slo
    from llmopt.planner.choose import Limit

    return [
        Limit(metric=each.metric, percentile=each.percentile, limit=each.limit)
        for each in (slo.parse(t) for t in texts)
    ]


def _workload(
    name: str | None,
    prompt_tokens: int | None,
    output_tokens: int | None,
    concurrency: int | None,
    positions: int | None,
) -> Workload:
    """The mean lengths of a workload of `llmopt bench`, or those given, or the defaults where the model has so many."""
    from llmopt.planner.roofline import Workload

    prompt, output = Workload().prompt_tokens, Workload().output_tokens
    if name is not None:
        prompt, output = _means(name)
    elif positions is not None and positions < prompt + output:
        prompt, output = max(1, positions * 4 // 5), max(1, positions // 5)
    return Workload(
        prompt_tokens=prompt if prompt_tokens is None else float(prompt_tokens),
        output_tokens=output if output_tokens is None else float(output_tokens),
        concurrency=concurrency,
    )


def _means(name: str) -> tuple[float, float]:
    """Tokens of a request and of its answer, on average over many conversations drawn as bench draws them.

    A later turn has all before it in its prompt; nothing is taken for kept in a cache of prefixes.
    """
    import random

    from llmopt.bench.workload import spec

    workload = spec.resolve(name)
    if workload.file is not None:
        message = f"the lengths in `{workload.file}` are not known before they are read with a tokenizer"
        raise SettingsError(message, hint="give `--prompt-tokens` and `--output-tokens`")
    rng = random.Random(0)
    prompts = outputs = requests = 0
    for _ in range(2000):
        prefix = 0 if workload.prefix_tokens == 0 else spec.draw_tokens(workload.prefix_tokens, rng)
        before = prefix
        for turn in range(spec.draw_tokens(workload.turns, rng)):
            said = spec.draw_tokens(workload.next_tokens if turn else workload.prompt_tokens, rng)
            answer = spec.draw_tokens(workload.output_tokens, rng)
            prompts, outputs, requests = prompts + before + said, outputs + answer, requests + 1
            before += said + answer
    return round(prompts / requests), round(outputs / requests)


def _rows(hardware: str | None, prices: Sequence[str], session: opt.Session) -> list[Hardware]:
    from llmopt.planner import hardware as table

    rows = [_here(session) if name == "here" else table.find(name) for name in _list(hardware)]
    rows = list({row.name: row for row in rows}.values()) or list(table.instances())
    for text in prices:
        name, _, value = text.rpartition("=")
        try:
            usd = float(value)
        except ValueError:
            usd = -1.0
        if not 0 <= usd < 1e6:
            raise SettingsError(f"`--price {text}` is no price", hint="for example `--price 16.3`, in USD an hour")
        if not name and len(rows) > 1:
            raise SettingsError(f"`--price {text}` could be of {len(rows)} rows", hint=f"write `g5.48xlarge={value}`")
        wanted = name and (name if name == "here" else table.find(name).name)
        if wanted and wanted not in [row.name for row in rows]:
            raise SettingsError(f"`--price {text}` is of hardware that is not planned", hint="name it in `--hardware`")
        rows = [row.priced(usd) if not wanted or row.name == wanted else row for row in rows]
    return rows


def _here(session: opt.Session) -> Hardware:
    from llmopt.planner.machine import machine

    session.console.progress("measuring this machine")
    return machine()


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


# --- what is shown


def _text(
    shape: ModelShape,
    workload: Workload,
    limits: Sequence[Limit],
    found: Sequence[Option],
    chosen: Option | None,
    *,
    each_precision: bool,
) -> Iterator[str]:
    from llmopt.cli.tables import table
    from llmopt.planner.memory import kv_sequence_bytes, weight_bytes
    from llmopt.planner.precision import KV_PRECISIONS, PRECISIONS

    counted = f"{_count(shape.parameters)} parameters"
    active = f", {_count(shape.active_parameters)} of them for each token" if shape.is_mixture else ""
    yield f"model        {shape.name}: {counted}{active}"
    listed = {row.name: weight_bytes(shape, row) for row in PRECISIONS.values()}
    yield "weights      " + ", ".join(f"{name} {_gb(size)}" for name, size in listed.items())
    if shape.stored_bytes is not None:
        yield f"             on disk {_gb(shape.stored_bytes)}"
    used = [name for name in KV_PRECISIONS if name in {option.kv_precision for option in found}]
    caches = ", ".join(f"{name} {_gb(kv_sequence_bytes(shape, workload.total_tokens, name))}" for name in used)
    yield f"KV cache     {caches} for a request of {workload.total_tokens:,.0f} tokens"
    flight = "" if workload.concurrency is None else f", {workload.concurrency} requests in flight"
    asked = "".join(f", {limit}" for limit in limits)
    yield f"workload     {workload.prompt_tokens:,.0f} tokens in, {workload.output_tokens:,.0f} out{flight}{asked}"
    yield ""
    shown = found if each_precision else _cheapest(found)
    first = ["  HARDWARE", *([] if each_precision else ["FITS IN"]), "WEIGHTS"]
    head = [*first, "TP", "GB", "BATCH", "TTFT", "TPOT", "TOK/S", "$/h", "$/1M"]
    fitting = sorted(
        (option for option in shown if option.fits), key=lambda option: (option is not chosen, *_order(option))
    )
    if fitting:
        yield table([head, *(_cells(option, found, chosen, each_precision) for option in fitting)], left=len(first))
    else:
        yield "Nothing fits that meets the limits." if limits else "Nothing fits."
    yield from _refused(found, [option for option in shown if not option.fits])
    yield ""
    if chosen is not None:
        yield f"* {'costs least a token' if chosen.usd_per_million is not None else 'is fastest for its devices'}"
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    for note in _notes(shape, found):
        yield textwrap.fill(note, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _cheapest(found: Sequence[Option]) -> list[Option]:
    """Of each row of hardware the best precision, or one that says why there is none."""
    from llmopt.planner.choose import best

    kept = []
    for name in dict.fromkeys(option.hardware.name for option in found):
        own = [option for option in found if option.hardware.name == name]
        fitting = [option for option in own if option.fits]
        kept.append(best(own) or (fitting[0] if fitting else own[-1]))
    return kept


def _order(option: Option) -> tuple[bool, float, float]:
    cost = option.usd_per_million
    return cost is None, cost or 0.0, -(option.tokens_s or 0.0)


def _cells(option: Option, found: Sequence[Option], chosen: Option | None, each_precision: bool) -> list[str]:
    fitting = [other.precision.name for other in found if other.hardware is option.hardware and other.fits]
    prediction, memory, hardware = option.prediction, option.memory, option.hardware
    assert memory is not None
    several = f"{option.instances} x " if option.instances > 1 else ""
    split = str(option.tensor_parallel) + (f"x{option.pipeline_parallel}" if option.pipeline_parallel > 1 else "")
    replicas = f"{option.replicas}x" if option.replicas > 1 else ""
    cost, price = option.usd_per_million, hardware.price_usd_h
    return [
        ("* " if option is chosen else "  ") + several + hardware.name,
        *([] if each_precision else [" ".join(fitting)]),
        option.precision.name,
        split,
        f"{memory.total / 1e9:.1f}/{hardware.memory_bytes / 1e9:.0f}",
        f"{replicas}{option.batch}",
        "-" if prediction is None else _ms(prediction.ttft_s),
        "-" if prediction is None else _ms(prediction.tpot_s),
        "-" if option.tokens_s is None else f"{option.tokens_s:,.0f}",
        _usd(None if price is None else price * option.instances),
        _usd(cost),
    ]


def _refused(found: Sequence[Option], refused: Sequence[Option]) -> Iterator[str]:
    if refused:
        yield ""
        yield "Ruled out:"
        width = max(len(f"{option.hardware.name} {option.precision.name}") for option in refused)
        for option in refused:
            yield f"  {f'{option.hardware.name} {option.precision.name}'.ljust(width)}  {option.reason}"


def _notes(shape: ModelShape, found: Sequence[Option]) -> Iterator[str]:
    from llmopt.planner.roofline import EFFICIENCIES

    for note in shape.notes:
        yield f"note: {note}"
    if any(option.hardware.price_usd_h is None for option in found):
        yield "note: `?`: price not known, give it with `--price` (0 where it is paid for anyway)"
    if any(option.fits and option.prediction is None for option in found):
        yield "note: `-`: no speed is predicted for it, so no limit was checked"
    yield (
        "Predicted, not measured. GB: what the fullest device holds, of what it has. BATCH: requests at once, of each "
        "replica. TTFT, TPOT: mean milliseconds to the first token and from token to token. TOK/S: of output, of all "
        "replicas. $/1M: for a million of them."
    )
    rows = {option.hardware.name: option.hardware for option in found}
    if "here" in rows:
        yield f"here: {rows['here'].source}"
    told = {row.kind for row in rows.values() if row.bandwidth_efficiency is None or row.compute_efficiency is None}
    for kind in sorted(told & set(EFFICIENCIES)):
        share = EFFICIENCIES[kind]
        reached = f"{100 * share.bandwidth:.0f} % of the bandwidth and {100 * share.compute:.0f} % of the operations"
        yield f"{kind.upper()}: {reached} are reached unless a row says otherwise, {share.source}"
    for source in sorted({row.price_source for row in rows.values() if row.price_usd_h is not None}):
        yield f"prices: {source}"
    yield "A narrower precision changes answers: `llmopt eval --against` measures how much."


def _gb(size: float) -> str:
    """In 10^9 bytes, as data sheets and model cards count."""
    gb = size / 1e9
    return f"{gb:.0f} GB" if gb >= 99.5 else f"{gb:.1f} GB" if gb >= 1 else f"{size / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _usd(amount: float | None) -> str:
    return "?" if amount is None else f"{amount:.2f}" if amount >= 0.095 or amount == 0 else f"{amount:.4f}"


def _report(
    shape: ModelShape, workload: Workload, limits: Sequence[Limit], found: Sequence[Option], chosen: Option | None
) -> dict[str, Any]:
    from llmopt.planner.memory import weight_bytes
    from llmopt.planner.precision import PRECISIONS
    from llmopt.planner.roofline import EFFICIENCIES

    return {
        "model": {
            "name": shape.name,
            "model_type": shape.model_type,
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
            "layers": len(shape.layers),
            "stored_bytes": shape.stored_bytes,
            "weights_bytes": {row.name: round(weight_bytes(shape, row)) for row in PRECISIONS.values()},
            "notes": list(shape.notes),
        },
        "workload": asdict(workload),
        "slo": [str(limit) for limit in limits],
        "efficiencies": {kind: asdict(row) for kind, row in EFFICIENCIES.items()},
        "options": [_option(option) for option in found],
        "best": None if chosen is None else _option(chosen),
    }


def _option(option: Option) -> dict[str, Any]:
    memory, prediction, row = option.memory, option.prediction, option.hardware
    return {
        "hardware": row.name,
        "devices": row.devices,
        "memory_bytes": row.memory_bytes,
        "precision": option.precision.name,
        "kv_cache": option.kv_precision,
        "fits": option.fits,
        "reason": option.reason,
        "tensor_parallel": option.tensor_parallel,
        "pipeline_parallel": option.pipeline_parallel,
        "replicas": option.replicas,
        "instances": option.instances,
        "batch": option.batch,
        "memory": None if memory is None else asdict(memory) | {"total": memory.total},
        "prediction": None if prediction is None else asdict(prediction),
        "tokens_per_s": option.tokens_s,
        "price_usd_h": row.price_usd_h,
        "price_source": row.price_source,
        "usd_per_million_tokens": option.usd_per_million,
        "source": row.source,
    }
