"""Who made an artifact, when and how: an in-toto Statement with SLSA provenance, kept beside the manifest.

None of it is in the artifact's digest. Sources: in-toto attestation framework, Statement v1, ResourceDescriptor and
DigestSet; SLSA, provenance v1 (names of the form `<vendor>_<field>` are its rule for fields of one's own); package-url.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmopt.artifacts.manifest import MANIFEST_NAME, Manifest
from llmopt.artifacts.outcome import Json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"

#: Of one byproduct. The framework suggests 1 KB and a link to the rest; a log has no other place than this.
_MOST_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NOT_ON_PYPI = ("cuda", "python")  # among the dependencies of an engine built elsewhere


def attest(
    manifest: Manifest,
    *,
    started: float,
    finished: float,
    command: Sequence[str] | None = None,
    attempt: int = 1,
    folder: Path | None = None,
    byproducts: Mapping[str, str] | None = None,
) -> dict[str, Json]:
    """The statement for an artifact made between two times (seconds since 1970).

    `command` is the command line, by default this process's; `folder`, by default the current one, is where a git
    checkout is looked for. Of each of `byproducts`, texts by name, the end is kept, at most a MiB.
    """
    import llmopt

    subject: list[Json] = [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in manifest.files]
    subject.append({"name": MANIFEST_NAME, "digest": {"sha256": manifest.hex}})
    return {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": _definition(manifest),
            "runDetails": {
                "builder": {"id": "urn:llmopt:local", "version": {"llmopt": llmopt.__version__}},
                "metadata": {
                    "invocationId": f"{os.uname().nodename}:{os.getpid()}:{time.time_ns()}",
                    "startedOn": _timestamp(started),
                    "finishedOn": _timestamp(finished),
                    "llmopt_host": os.uname().nodename,
                    "llmopt_user": _user(),
                    "llmopt_commit": git_commit(folder or Path.cwd()),
                    "llmopt_command": list(sys.argv if command is None else command),
                    "llmopt_attempt": attempt,
                },
                **({"byproducts": [_byproduct(name, text) for name, text in byproducts.items()]} if byproducts else {}),
            },
        },
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out in the git work tree around `folder`, read without running git; None without one."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        try:
            dot_git = parent / ".git"
            if dot_git.is_dir():
                return _head(dot_git)
            if dot_git.is_file():  # a work tree of its own, or a submodule, points to where its data lies
                return _head(parent / dot_git.read_text().removeprefix("gitdir:").strip())
        except (OSError, ValueError):
            return None
    return None


def _byproduct(name: str, text: str) -> dict[str, Json]:
    """As a ResourceDescriptor, whose content is base64."""
    content = base64.b64encode(text.encode()[-_MOST_BYTES:]).decode()
    return {"name": name, "mediaType": "text/plain", "content": content}


def _definition(manifest: Manifest) -> dict[str, Json]:
    action = manifest.action
    if action is None:
        return {"buildType": "urn:llmopt:import:1", "externalParameters": {"kind": manifest.kind}}
    inputs = [
        _resource(name, given, action.inputs.get(f"{name}_license"))
        for name, given in sorted(action.inputs.items())
        if not name.endswith("_license")
    ]
    packages = [_package(name, version) for name, version in sorted(action.deps.items())]
    return {
        "buildType": "urn:llmopt:action:1",
        "externalParameters": {"op": action.op, "settings": dict(action.settings), "target": dict(action.target)},
        "internalParameters": {"key": action.key, "op_version": action.op_version, "code": action.code},
        "resolvedDependencies": [*inputs, *packages],
    }


def _resource(name: str, given: str, license: str | None) -> Json:
    """An input of an action: an artifact by its digest, `hf:REPOSITORY@COMMIT`, or the URL of a server."""
    found = {"name": name, **_where(given)}
    return found if license is None else {**found, "annotations": {"license": license}}


def _where(given: str) -> dict[str, Json]:
    if given.startswith("sha256:"):
        return {"digest": {"sha256": given.removeprefix("sha256:")}}
    repository, _, commit = given.rpartition("@")
    if repository.startswith("hf:") and _COMMIT.fullmatch(commit):
        uri = given if repository.startswith("hf:datasets/") else f"pkg:huggingface/{given.removeprefix('hf:')}"
        return {"uri": uri, "digest": {"gitCommit": commit}}
    scheme, separator, rest = given.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    return {"uri": f"{scheme.lower()}{separator}{user}{at}{host.lower()}{slash}{path}"}


def _package(name: str, version: str) -> Json:
    from urllib.parse import quote

    kind = "generic" if name in _NOT_ON_PYPI else "pypi"
    return {"uri": f"pkg:{kind}/{name.lower().replace('_', '-')}@{quote(version, safe='')}"}


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head or None
    reference = head.removeprefix("ref: ")
    common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
    for place in (git, common):
        if (place / reference).is_file():
            return (place / reference).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container run under a number that has no name
        return str(os.getuid())
