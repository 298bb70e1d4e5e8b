"""Run by test_remote_races.py, several at once: one of the jobs below, when the file `go` appears.

    races.py JOB FOLDER URL NUMBER TURNS

FOLDER is shared by all; URL is a store to push to, or `-`: the store is FOLDER/store. Prints one JSON value.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmopt.artifacts import Action, Manifest, Store, attest
from llmopt.artifacts import remote as remote_module
from llmopt.artifacts.local import collect_local
from llmopt.artifacts.remote import Remote, transfer
from llmopt.artifacts.remote.collect import collect

remote_module._LOOK_S = 0.02


def make(store: Store, number: int, turn: int, **about: Any) -> Manifest:
    action = Action(
        op="x", op_version=1, inputs={}, settings={"number": number, "turn": turn}, code="", deps={}, target={}
    )
    with store.stage() as folder:
        (folder / "shared").write_bytes(f"shared by {turn % 3}".encode() * 1000)
        (folder / "own").write_bytes(f"{number} {turn}".encode() * 1000)
        return store.put(folder, kind="model", action=action, **about)


def said(made: Manifest) -> dict[str, Any]:
    return attest(made, started=0, finished=1)


def same(root: Path, url: str, number: int, turns: int) -> list[str]:
    """Put, or push, one and the same artifact again and again; all the ids that it got."""
    if url == "-":
        store = Store(root / "store")
        return sorted({make(store, 0, 0, attestation=said).id for _ in range(turns)})
    store = Store(root / f"own-{number}")
    made = make(store, 0, 0, attestation=said)
    for _ in range(turns):
        transfer.push(store, made.id, Remote.open(url))
    return [made.id]


def name(root: Path, url: str, number: int, turns: int) -> list[tuple[str, str | None]]:
    """Move one name to each of one's own artifacts: to what, and what it was told that this replaced."""
    own = json.loads((root / "artifacts").read_text())[number * turns : (number + 1) * turns]
    place = Store(root / "store") if url == "-" else Remote.open(url)
    return [(artifact, place.set_name("best", artifact)) for artifact in own]


def write(root: Path, url: str, number: int, turns: int) -> list[str]:
    """Make artifacts and name them, beside a removal; each is whole as long as it has its name."""
    for turn in range(turns):
        store = Store(root / "store") if url == "-" else Store(root / f"own-{number}")
        made = make(store, number, turn, attestation=said)
        if url == "-":
            store.set_name(f"w{number}-{turn % 2}", made.id)
            reader = Store(store.root)
        else:
            remote = Remote.open(url)
            with remote.writing((), [made.id]):
                transfer.push(store, made.id, remote)
                remote.set_name(f"w{number}-{turn % 2}", made.id)
            reader = Store(root / f"own-{number}-{turn}")
            transfer.pull(reader, made.id, Remote.open(url))
        assert (reader.path(made.id) / "own").read_bytes() == f"{number} {turn}".encode() * 1000
        assert reader.verify(made.id) == []
    return []


def clean(root: Path, url: str, number: int, turns: int) -> dict[str, int]:
    """Remove what nobody needs until the file `stop` appears."""
    runs = removed = 0
    while not (root / "stop").exists():
        found = (
            collect_local(Store(root / "store"), older_than_s=0)
            if url == "-"
            else collect(Remote.open(url), older_than_s=0)
        )
        runs, removed = runs + 1, removed + len(found.artifacts)
        time.sleep(0.01)
    return {"runs": runs, "removed": removed}


JOBS: dict[str, Callable[[Path, str, int, int], object]] = {job.__name__: job for job in (same, name, write, clean)}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    (folder / f"ready-{sys.argv[1]}-{sys.argv[4]}").touch()
    while not (folder / "go").exists():
        time.sleep(0.002)
    print(json.dumps(JOBS[sys.argv[1]](folder, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
