"""Profiles: YAML files of settings for each stage, shipped with the package or the user's own.

A profile has the sections `quantize`, `compile`, `eval` and `bench`, a `description`, and may `extends` another profile
(by its shipped name, or by a path beside it). A profile with a `model` is a pipeline. Which settings a section takes is
for the stages to say; this loader knows the sections only, and remembers which line of which file said what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import LlmoptError, SettingsError, nearest

if TYPE_CHECKING:
    import yaml

SECTIONS = ("quantize", "compile", "eval", "bench")
#: Settings that name a file, relative to the YAML that says so.
PATHS = ("quantize.calib", "quantize.adapter", "eval.text", "eval.tasks_path")
_FOLDER = Path(__file__).parent
_TEXTS = ("extends", "description", "model")
CALIBRATION_TEXT = _FOLDER / "text" / "calibration.txt"
HELDOUT_TEXT = _FOLDER / "text" / "heldout.txt"
WORKLOADS = _FOLDER / "workloads"  # what `llmopt bench` sends: a file each, not profiles of stages


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The merged settings of a profile and of what it extends.

    `origins` says where each setting was written: "quantize.bits" -> "demo.yaml:7". `model` and PATHS are absolute.
    """

    name: str
    description: str
    model: str | None
    sections: Mapping[str, Mapping[str, Any]]
    origins: Mapping[str, str]

    def section(self, name: str) -> dict[str, Any]:
        return dict(self.sections.get(name, {}))


_NOTHING = Profile(name="", description="", model=None, sections={}, origins={})


def shipped() -> tuple[str, ...]:
    """The names of the profiles that come with the package."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


def load(reference: str, *, _seen: tuple[Path, ...] = ()) -> Profile:
    """The profile in the file `reference`, or the shipped one of that name; unknown sections are SettingsErrors."""
    file = find(reference)
    if file in _seen:
        raise SettingsError(f"`{file}` extends itself", hint="remove one `extends:` of the circle")
    document = _Document.read(file)
    parent = document.text("extends")
    base = _NOTHING
    if parent is not None:
        beside = file.parent / parent
        base = load(str(beside) if beside.is_file() else parent, _seen=(*_seen, file))
    own = {name: document.section(name) for name in SECTIONS if name in document.values}
    model = document.text("model")
    return Profile(
        name=file.stem,
        description=document.text("description") or base.description,
        model=base.model if model is None else document.beside(model),
        sections={n: {**base.section(n), **own.get(n, {})} for n in SECTIONS if n in own or n in base.sections},
        origins={**base.origins, **{key: document.place(key) for key in document.lines}},
    )


def find(reference: str) -> Path:
    """The YAML file that `reference` names: a path, or else a shipped profile."""
    path = Path(reference)
    if path.is_file():
        return path.resolve()
    if reference in shipped():
        return _FOLDER / f"{reference}.yaml"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise LlmoptError(f"no pipeline or profile file `{reference}`", hint="`llmopt profiles ls` lists those shipped")
    raise SettingsError(f"no profile is named `{reference}`", hint=nearest(reference, shipped()))


def parse_value(text: str) -> Any:
    """A value as YAML types it: `4` is a number, `true` a truth, `[1, 4]` a list, anything else text."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"`{text}` is not a YAML value", hint="quote it") from None


def assign(settings: Mapping[str, Any], path: str, text: str) -> dict[str, Any]:
    """The settings with the value of `text` (YAML) at `path`: `bits`, or `build.workers`, which is within a mapping."""
    key, dot, inner = path.partition(".")
    value, before = parse_value(text), settings.get(key)
    return {**settings, key: {**(before if isinstance(before, dict) else {}), inner: value} if dot else value}


@dataclass(frozen=True, slots=True)
class _Document:
    """One YAML file: its top level, and the line of every key by its dotted name."""

    file: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    @classmethod
    def read(cls, file: Path) -> _Document:
        document = cls(file, *read_mapping(file, hint="write `section:` with its settings below it"))
        for key in document.values:
            if key not in SECTIONS + _TEXTS:
                known = nearest(key, SECTIONS + _TEXTS)
                raise SettingsError(f"{document.place(key)}: a profile has no section `{key}`", hint=known)
        return document

    def place(self, key: str) -> str:
        return f"{self.file.name}:{self.lines[key]}"

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise SettingsError(f"{self.place(key)}: `{key}` must be text, not `{value}`", hint="quote it")
        return value

    def section(self, name: str) -> dict[str, Any]:
        values = self.values[name]
        if values is None:  # `compile:` with nothing below it: the stage with its defaults
            return {}
        if not isinstance(values, dict):
            message = f"{self.place(name)}: `{name}` is not a section of settings"
            raise SettingsError(message, hint=f"write `{name}:` and the settings below it")
        return {
            str(key): self.beside(value) if f"{name}.{key}" in PATHS and isinstance(value, str) else value
            for key, value in values.items()
        }

    def beside(self, reference: str) -> str:
        """A path relative to the file as one that is not; what is no path (an id, a name) as it is."""
        path = self.file.parent / reference
        return str(path) if reference.startswith(".") or path.exists() else reference


def read_mapping(file: Path, *, hint: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The top level of a YAML file, and the line of every key by its dotted name; `hint` says how to write one."""
    root, values = _parse(file)
    if not isinstance(values, dict):
        raise SettingsError(f"{file.name} is not a mapping", hint=hint)
    lines: dict[str, int] = {}
    for key, line in _keys(root):
        if key in lines:
            raise SettingsError(
                f"{file.name}:{line}: `{key}` is given twice", hint=f"remove it here or on line {lines[key]}"
            )
        lines[key] = line
    return {str(key): value for key, value in values.items()}, lines


def _parse(file: Path) -> tuple[yaml.Node | None, Any]:
    """The YAML tree, which knows its lines, and the value that it means."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(file.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            return root, {} if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        at = f"{file.name}:{error.problem_mark.line + 1}" if error.problem_mark else file.name
        hint = "check indentation, colons and quotes"
        raise SettingsError(f"{at}: not valid YAML: {error.problem}", hint=hint) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file.name} is not YAML: {error}", hint="a profile is plain UTF-8 text") from None
    except OSError as error:
        raise LlmoptError(f"`{file}` cannot be read: {error.strerror}") from None


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The dotted name and the line of every key of a mapping."""
    import yaml

    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _keys(value, f"{prefix}{key.value}.")
