"""An artifact's files under their own names: a folder of links to blobs, put right before it is handed out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmopt.artifacts import disk
from llmopt.artifacts.digest import faults, same_bytes
from llmopt.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest

#: Odd paths, and files that are missing or not as they should be.
Faults = tuple[list[str], list[FileEntry]]
NO_FAULTS: Faults = ([], [])

Stored = Callable[[FileEntry], Path]


def find_faults(tree: Path, manifest: Manifest, stored: Stored) -> Faults:
    """What keeps the folder from being the artifact. `stored` tells where a file's blob is, which is right."""

    def same(path: Path, entry: FileEntry) -> bool:
        """A link to the stored file is as good as that file; anything else is read."""
        try:
            return path.samefile(stored(entry)) or same_bytes(path, entry)
        except OSError:
            return False

    return faults(tree, _files(manifest), same)


def repair(tree: Path, manifest: Manifest, stored: Stored, aside: Path) -> None:
    """Move out what is wrong, then link in what is missing. A right file is at its place throughout.

    Others may be reading it, or repairing too.
    """
    files = {entry.path for entry in _files(manifest)}
    if tree.is_symlink() or tree.is_file():
        tree.unlink(missing_ok=True)
    odd, missing = find_faults(tree, manifest, stored)
    for number, path in enumerate(odd):
        if path not in files or (tree / path).is_dir():  # what is not a folder is replaced below, at once
            with suppress(FileNotFoundError):
                (tree / path).rename(aside / f"{number}.odd")
    for number, entry in enumerate(missing):
        target, link = tree / entry.path, aside / f"{number}.link"
        target.parent.mkdir(parents=True, exist_ok=True)
        disk.link_or_copy(stored(entry), link)
        link.replace(target)


def _files(manifest: Manifest) -> tuple[FileEntry, ...]:
    return (*manifest.files, FileEntry(MANIFEST_NAME, len(manifest.to_bytes()), manifest.hex))
