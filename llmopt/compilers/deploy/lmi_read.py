"""An LMI user's `serving.properties` as a pipeline: quantize and compile here, deployed on LMI again.

Every property of the file becomes a setting, is kept for the container (`compile.lmi`), or is told about; none is
passed over in silence. What they mean is said by djl-serving's documentation and code, see `lmi`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmopt.artifacts.outcome import Json
from llmopt.compilers.deploy import images, lmi, properties
from llmopt.compilers.deploy import lmi_names as names
from llmopt.compilers.deploy.base import Runtime
from llmopt.compilers.deploy.properties import Entry
from llmopt.errors import LlmoptError, SettingsError, nearest
from llmopt.profiles import Profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """The pipeline, and a line for everything in the file that it does not carry, or carries otherwise."""

    profile: Profile
    notes: tuple[str, ...]


def read(reference: str) -> Read:
    """The pipeline of a file; SettingsError with the line for what is malformed, misspelt or contradicts itself."""
    path = Path(reference)
    try:
        # java.util.Properties reads a stream as ISO 8859-1.
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise LlmoptError(f"`{path}` cannot be read: {error.strerror}") from None
    entries = {entry.key: entry for entry in properties.parse(text, file=path.name)}
    return _Reader(file=path, entries=entries).read()


@dataclass(kw_only=True, slots=True)
class _Reader:
    """Goes over the entries once; sections, origins and notes grow."""

    file: Path
    entries: Mapping[str, Entry]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[int, str]] = field(default_factory=list)  # with the line, 0 for the file as a whole
    _sources: dict[str, Entry] = field(default_factory=dict)

    def read(self) -> Read:
        runtime = self._runtime()
        image = images.LMI_TENSORRT_LLM if runtime == "tensorrt-llm" else images.LMI_VLLM
        version = [*image][-1]
        self.sections = {"compile": {"target": runtime, "version": version, "emit": ["lmi"]}}
        self.origins = {"compile": self.file.name}
        if runtime == "tensorrt-llm":
            self.sections["compile"]["mode"] = "engine"
        self._handler(runtime)
        self._quantize(runtime)
        for entry in self.entries.values():
            if entry.key not in names.READ_APART:
                self._carry(entry, runtime)
        self._degrees(runtime)
        self._dtype(runtime)
        if runtime == "tensorrt-llm":
            self._lengths()
        elif "option.max_output_len" in self.entries:
            self._note(self.entries["option.max_output_len"], "vLLM has no such limit")
        model = self._model()
        steps: tuple[str, ...] = ("quantize", "compile")
        order = {name: self.sections[name] for name in steps if name in self.sections}
        profile = Profile(
            name=self.file.stem,
            description=f"LMI's {self.file.name}, for `{runtime}`",
            model=model,
            sections=order,
            origins=self.origins,
        )
        return Read(profile=profile, notes=tuple(note for _, note in sorted(self.notes)))

    def _runtime(self) -> Runtime:
        """The engine that the container would run; where the file leaves it open, by what it says otherwise."""
        rolling, entry_point = self.entries.get("option.rolling_batch"), self.entries.get("option.entryPoint")
        if rolling is not None:
            if rolling.value.lower() not in names.ROLLING_BATCH:
                raise self._error(rolling, f"cannot be `{rolling.value}` here", hint=nearest("", names.ROLLING_BATCH))
            named = names.ROLLING_BATCH[rolling.value.lower()]
            if named is not None:
                self._note(rolling, f"the target is `{named}`; its containers serve without LMI's rolling batch")
                return named
        if entry_point is not None and entry_point.value in names.ENTRY_POINTS:
            return names.ENTRY_POINTS[entry_point.value]
        engine, vllm = (names.TABLES[runtime] for runtime in ("tensorrt-llm", "vllm"))
        of_engine = [key for key in self.entries if key in engine and key not in vllm]
        of_vllm = [key for key in self.entries if key in vllm and key not in engine]
        of_engine += [key for key in self.entries if key.startswith("option.smoothquant") or key == "option.quant_algo"]
        if self._says("option.mpi_mode", "true") or self._says("engine", "mpi"):
            of_engine.append("option.mpi_mode")
        if self._says("option.quantize", "smoothquant"):
            of_engine.append("option.quantize")
        found: Runtime = "tensorrt-llm" if len(of_engine) > len(of_vllm) else "vllm"
        telling = of_engine if found == "tensorrt-llm" else of_vllm
        because = f" for `{telling[0]}`" if telling else ", which LMI's current containers run"
        words = f"{self.file.name} leaves the engine to the container: taken for `{found}`{because}"
        self.notes.append((0, f"{words} (`option.rolling_batch=trtllm` or `vllm` says it)"))
        return found

    def _handler(self, runtime: Runtime) -> None:
        """What LMI runs the model with is chosen anew, but for a handler of the user's own."""
        engine, entry_point = self.entries.get("engine"), self.entries.get("option.entryPoint")
        if engine is not None and engine.value.lower() not in ("python", "mpi"):
            raise self._error(engine, f"cannot be `{engine.value}` here", hint="LMI's engines are `Python` and `MPI`")
        if entry_point is not None and entry_point.value not in names.ENTRY_POINTS:
            self._keep(entry_point)
            self._note(entry_point, "a handler of your own: kept for the container, with LMI's asynchronous mode")
        elif entry_point is not None and entry_point.value != lmi.HANDLERS[runtime]:
            self._note(entry_point, f"not carried: LMI's handler for `{runtime}` is `{lmi.HANDLERS[runtime]}`")
        for key, written in (("engine", "python"), ("option.mpi_mode", "false"), ("option.async_mode", "true")):
            if key in self.entries and not self._says(key, written):
                self._note(
                    self.entries[key], f"not carried: LMI's handler for `{runtime}` is asynchronous, without MPI"
                )

    def _carry(self, entry: Entry, runtime: Runtime) -> None:
        """One property that a table knows, or that none does."""
        table = names.TABLES[runtime]
        other: Runtime = "vllm" if runtime == "tensorrt-llm" else "tensorrt-llm"
        if entry.key in table:
            setting, convert = table[entry.key]
            self._set(setting, entry, self._value(entry, convert))
        elif entry.key in names.KEPT:
            self._keep(entry)
        elif entry.key in names.OUTDATED:
            self._keep(entry)
            self._note(entry, "kept, but LMI's last TensorRT-LLM container does not read it any more")
        elif entry.key in names.DROPPED:
            self._note(entry, f"not carried: {names.DROPPED[entry.key]}")
        elif entry.key in names.TABLES[other]:
            self._note(entry, f"not carried: it is of LMI's {other} container, and the target is `{runtime}`")
        else:
            self._unknown(entry, runtime)

    def _unknown(self, entry: Entry, runtime: Runtime) -> None:
        """A misspelling is refused; anything else goes to where LMI would send it, and is told."""
        known = [*names.TABLES[runtime], *names.KEPT, *names.DROPPED, *names.OUTDATED, *names.READ_APART]
        close = difflib.get_close_matches(entry.key, known, n=1, cutoff=0.87)
        if close:
            raise self._error(entry, "is no property of LMI", hint=f"did you mean `{close[0]}`?")
        if runtime == "vllm" and entry.key.startswith("option."):
            self._set(f"compile.serve.{entry.key.removeprefix('option.')}", entry, names.any_value(entry.value))
            self._note(entry, "not known here: passed to vLLM as it is")
        else:
            self._keep(entry)
            self._note(entry, "not known here: kept for the container as it is")

    def _degrees(self, runtime: Runtime) -> None:
        entry = self.entries.get("option.tensor_parallel_degree")
        if entry is not None and entry.value.lower() == "max":
            self._note(entry, "not carried: it depends on the instance; `--set compile.tensor_parallel=N` says it")
        elif entry is not None:
            self._set("compile.tensor_parallel", entry, self._value(entry, names.whole))
        experts = self.entries.get("option.enable_expert_parallel")
        if experts is None:
            return
        if runtime == "tensorrt-llm":
            self._note(experts, "not carried: `option.moe_expert_parallel_size` is TensorRT-LLM's")
        elif self._value(experts, names.truth):
            # vLLM spreads the experts over all of its ranks.
            self._set("compile.expert_parallel", experts, self.sections["compile"].get("tensor_parallel", 1))

    def _dtype(self, runtime: Runtime) -> None:
        entry = self.entries.get("option.dtype")
        if entry is None:
            return
        value = names.DTYPES.get(entry.value.lower())
        if value is None:
            raise self._error(entry, f"cannot be `{entry.value}` here", hint=nearest(entry.value, names.DTYPES))
        self._set("compile.dtype", entry, value)

    def _lengths(self) -> None:
        """The whole sequence, from what LMI has for the answer; what is not said is the model's."""
        compile_, output = self.sections["compile"], self.entries.get("option.max_output_len")
        if output is None:
            return
        if "max_seq_len" in compile_:
            self._note(output, "not carried: `option.max_seq_len` is the limit")
            return
        prompt, answer = compile_.get("max_input_len", 0), self._value(output, names.whole)
        assert isinstance(answer, int)
        # LMI's documentation: "Now maps to max_seq_len"; files from before mean the answer alone.
        if answer > prompt:
            self._set("compile.max_seq_len", output, answer)
            self._note(output, f"taken for `max_seq_len: {answer}`, prompt and answer together, as LMI passes it on")
        else:
            self._set("compile.max_seq_len", output, prompt + answer)
            self._note(output, f"taken for the answer alone, which with the prompt is `max_seq_len: {prompt + answer}`")

    def _quantize(self, runtime: Runtime) -> None:
        """The section `quantize`, where the file asks for one."""
        asked = [self.entries[key] for key in names.QUANTIZE_NAMES if key in self.entries]
        for entry in asked[1:]:
            self._note(entry, f"not carried: `{asked[0].key}` says how")
        settings = self._method(asked[0], runtime) if asked else None
        if settings is None:
            for key in (*names.QUANTIZE_DETAILS, *names.QUANTIZE_OTHER):
                if key in self.entries:
                    self._note(self.entries[key], "not carried: nothing is quantized here")
            return
        for key, value in settings.items():
            self._set(f"quantize.{key}", asked[0], value, default=True)
        self._details(str(settings["method"]))

    def _method(self, entry: Entry, runtime: Runtime) -> Mapping[str, Json] | None:
        """The settings that a property names a method with; None where that leaves the weights as they are."""
        if entry.key == "option.quant_algo":
            known, word = names.QUANT_ALGO, entry.value.upper()
        elif runtime == "vllm":
            return self._quantize_vllm(entry)
        else:
            known, word = names.QUANTIZE, entry.value.lower()
        if word not in known:
            raise self._error(entry, f"cannot be `{entry.value}` here", hint=nearest(word, known))
        return known[word]

    def _quantize_vllm(self, entry: Entry) -> Mapping[str, Json] | None:
        """vLLM quantizes on the fly to FP8 or with bitsandbytes; another name is of a quantized checkpoint."""
        value = entry.value.lower()
        if value == "fp8":
            return {"method": "fp8"}
        if value.startswith("bitsandbytes"):
            self._set("compile.serve.quantization", entry, "bitsandbytes")
            self._note(entry, "nothing is quantized here: vLLM does so each time it loads the model")
        else:
            self._note(entry, "not carried: such a model is quantized already, and vLLM sees that in its config.json")
        return None

    def _details(self, method: str) -> None:
        """What the file says of the method, and what of that the method does not have."""
        for key, (setting, convert, methods) in names.QUANTIZE_DETAILS.items():
            entry = self.entries.get(key)
            if entry is None:
                continue
            if methods and method not in methods:
                self._note(entry, f"not carried: the method is `{method}`")
            else:
                self._set(setting, entry, self._value(entry, convert))
        self._smoothquant(method)
        for key in ("option.q_format", "option.awq_format"):
            entry = self.entries.get(key)
            if entry is not None and entry.value != "int4_awq":
                raise self._error(entry, f"cannot be `{entry.value}`", hint="LMI has `int4_awq` only")
            if entry is not None and method != "awq":
                self._note(entry, f"not carried: the method is `{method}`")
        zero_point = self.entries.get("option.has_zero_point")
        if zero_point is not None and self._value(zero_point, names.truth):
            raise self._error(zero_point, "cannot be true here", hint="TensorRT-LLM's engines take symmetric weights")
        cache = self.entries.get("option.kv_cache_quant_algo")
        if cache is not None and cache.value.lower() not in ("fp8", "int8"):
            raise self._error(cache, f"cannot be `{cache.value}` here", hint="`FP8` or `INT8`")
        if cache is not None:
            self._set("quantize.kv_cache", cache, cache.value.lower())

    def _smoothquant(self, method: str) -> None:
        per_token = self.entries.get("option.smoothquant_per_token")
        per_channel = self.entries.get("option.smoothquant_per_channel")
        if per_token is not None and method == "smoothquant":
            self._set("quantize.activations", per_token, "dynamic" if self._value(per_token, names.truth) else "static")
        elif per_token is not None:
            self._note(per_token, f"not carried: the method is `{method}`")
        if per_channel is not None and (method != "smoothquant" or not self._value(per_channel, names.truth)):
            reason = "weights have a scale a channel" if method == "smoothquant" else f"the method is `{method}`"
            self._note(per_channel, f"not carried: {reason}")

    def _model(self) -> str | None:
        """`option.model_id`, or the folder of the file where the model lies with it."""
        entry, revision = self.entries.get("option.model_id"), self.entries.get("option.revision")
        found = self._place_of_model(entry)
        if revision is not None and (entry is None or found != entry.value or "://" in found):
            self._note(revision, "not carried: it is for a model of the hub")
        elif revision is not None:
            found = f"{found}@{revision.value}"
        return found

    def _place_of_model(self, entry: Entry | None) -> str | None:
        folder = self.file.parent
        if entry is None:
            return str(folder) if (folder / "config.json").is_file() else None
        value = entry.value
        self.origins["model"] = self._place(entry)
        if not value or any(mark in value for mark in ("{{", "<", "${")):
            self._note(entry, "a place holder: `--set model=...` fills it in")
            return None
        if value.startswith("djl://"):
            self._note(entry, "of DJL's model zoo: `--set model=...` names a folder, or `ORG/NAME` of the hub")
            return None
        if value.startswith("s3://"):
            return value
        beside = folder / value
        return str(beside) if beside.is_dir() or value.startswith(".") else value

    def _keep(self, entry: Entry) -> None:
        self.sections["compile"].setdefault("lmi", {})[entry.key] = entry.value
        self.origins.setdefault("compile.lmi", self._place(entry))

    def _set(self, setting: str, entry: Entry, value: Json, *, default: bool = False) -> None:
        """Lay a value where `setting` says; a second property that says something else is an error."""
        section, *path, last = setting.split(".")
        place: dict[str, Any] = self.sections.setdefault(section, {})
        for part in path:
            place = place.setdefault(part, {})
        earlier = self._sources.get(setting)
        if earlier is not None and place.get(last) != value:
            raise self._error(
                entry, f"and `{earlier.key}` on line {earlier.line} contradict each other", hint="remove one of them"
            )
        place[last] = value
        if not default:
            self._sources[setting] = entry
        self.origins[f"{section}.{(*path, last)[0]}"] = self._place(entry)

    def _value(self, entry: Entry, convert: names.Convert) -> Json:
        try:
            return convert(entry.value)
        except (ValueError, KeyError):
            words = names.WORDS.get(convert, "true or false")
            raise self._error(
                entry, f"must be {words}, not `{entry.value}`", hint="as LMI's documentation has it"
            ) from None

    def _says(self, key: str, value: str) -> bool:
        entry = self.entries.get(key)
        return entry is not None and entry.value.lower() == value

    def _place(self, entry: Entry) -> str:
        return f"{self.file.name}:{entry.line}"

    def _note(self, entry: Entry, words: str) -> None:
        self.notes.append((entry.line, f"{self._place(entry)}: `{entry.key}={entry.value}`: {words}"))

    def _error(self, entry: Entry, words: str, *, hint: str) -> SettingsError:
        return SettingsError(f"{self._place(entry)}: `{entry.key}` {words}", hint=hint)
