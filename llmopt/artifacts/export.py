"""Copies of artifacts in folders of the user's own: complete or not there at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmopt.artifacts import disk
from llmopt.artifacts.digest import faults, read_manifest, same_bytes, sha256_file
from llmopt.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest
from llmopt.errors import CorruptError, LlmoptError, SettingsError

_OPTION = "--out"
_NEW_FOLDER = "name a folder that does not exist yet"


def check_out(dest: Path, *, anew: bool = False) -> None:
    """Refuse, before any work, a folder that an export could not make.

    It must be absent or empty, and some folder above it must be there to be written to. One that holds an exported
    artifact passes, since the work may turn out to give that very artifact; not `anew`, when it never does.
    """
    dest = Path(os.path.realpath(dest))
    if _is_taken(dest):
        if anew or not (dest / MANIFEST_NAME).is_file():
            raise _not_empty(dest)
        read_manifest(dest / MANIFEST_NAME, hint=_NEW_FOLDER)
        return
    if dest.exists() and (os.path.ismount(dest) or dest == Path.cwd()):
        raise SettingsError(f"`{dest}` cannot be replaced as a whole", hint="name a new folder inside it")
    parent = next(path for path in dest.parents if path.exists() or path.is_symlink())
    with disk.writing("the folder", dest, option=_OPTION):
        probe = parent / f".llmopt-{os.urandom(6).hex()}"
        probe.mkdir()
        probe.rmdir()


def copy_out(manifest: Manifest, dest: Path, blob: Callable[[str], Path], corrupt: CorruptError) -> None:
    """Copy the files, found by `blob(sha256)`, and the manifest as llmopt.json; `dest` appears when all is right.

    Nothing is done where `dest` is this artifact already. `corrupt` is raised when a copy is not what it should be.
    """
    check_out(dest)
    dest = Path(os.path.realpath(dest))
    if _is_taken(dest):
        if _holds(dest, manifest):
            return
        raise _not_empty(dest)
    with new_folder(dest, needs=manifest.size) as aside:
        for entry in manifest.files:
            target = aside / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            disk.copy_file(blob(entry.sha256), target)
            if sha256_file(target) != entry.sha256:
                raise corrupt
        (aside / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        disk.sync_file(aside / MANIFEST_NAME)
        disk.sync_folders([aside / entry.path for entry in manifest.files], aside)


@contextmanager
def new_folder(dest: Path, *, needs: int = 0) -> Iterator[Path]:
    """A folder beside `dest` to fill and to sync, which becomes `dest` when the `with` ends without an error."""
    dest = Path(os.path.realpath(dest))
    with (
        disk.writing("the folder", dest, option=_OPTION, needs=needs),
        disk.temporary(dest.parent, ".llmopt-") as aside,
    ):
        yield aside
        aside.rename(dest)
        disk.sync_folders([dest], dest.parent)


def _is_taken(dest: Path) -> bool:
    """Whether something is in the folder; LlmoptError when it is none, or cannot be looked into."""
    try:
        return any(dest.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise SettingsError(f"`{dest}` is not a folder, or lies under a file", hint=_NEW_FOLDER) from None
    except OSError as error:
        raise LlmoptError(f"`{dest}` cannot be read: {error.strerror}", hint=_NEW_FOLDER) from error


def _holds(dest: Path, manifest: Manifest) -> bool:
    own = FileEntry(MANIFEST_NAME, len(manifest.to_bytes()), manifest.hex)
    return faults(dest, (*manifest.files, own), same_bytes) == ([], [])


def _not_empty(dest: Path) -> SettingsError:
    return SettingsError(f"`{dest}` is not empty, and not this artifact", hint=f"empty it, or {_NEW_FOLDER}")
