"""Run by test_crash.py: put, or read, an artifact in a child process that comes to grief at a chosen point.

    crash.py STORE kill|interrupt|full|random COUNT

A child does the whole job once for each point: `kill` dies by SIGKILL before its n-th change of the file system,
`interrupt` gets a KeyboardInterrupt there, `full` finds the disk full from there on, up to COUNT points or the end of
the job; `random` is killed after a random time, until COUNT were. After each the store is checked. Prints one JSON
object: how many children, how many of them ended early.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llmopt.artifacts import Action, Manifest, Store, attest
from llmopt.errors import LlmoptError

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"}


def action(number: int) -> Action:
    return Action(op="quantize.rtn", op_version=1, inputs={}, settings={"number": number}, code="", deps={}, target={})


def job(store: Store, number: int) -> Manifest:
    """Every write that the store can do."""
    with store.stage() as folder:
        (folder / "sub").mkdir()
        (folder / "common").write_bytes(b"the same in all")
        (folder / "sub" / "own").write_bytes(str(number).encode() * 50_000)
        made = store.put(
            folder,
            kind="model",
            action=action(number),
            attestation=lambda manifest: attest(manifest, started=0, finished=1),
        )
    store.set_name("latest", made.id)
    store.path(made.id)
    store.export(made.id, store.root.parent / f"out-{number}")
    return made


def check(store: Store) -> None:
    """All that can be found is whole, by its own bytes."""
    fresh = Store(store.root)
    for artifact in fresh.ids():
        problems = [problem for problem in fresh.verify(artifact) if "/trees/" not in problem]
        assert not problems, problems
        for path in fresh.path(artifact).rglob("*"):
            assert path.is_dir() or path.stat().st_size, path
    for folder in (store.root / "actions").glob("*"):
        found = fresh.find(folder.name)
        assert found is not None or not fresh.results(folder.name)
    for artifact in fresh.names().values():
        fresh.get(artifact)
    for out in store.root.parent.glob("out-*"):
        assert {p.name for p in out.rglob("*") if p.is_file()} == {"common", "own", "llmopt.json"}


class Trouble:
    """An audit hook that counts changes of the file system and strikes at the n-th."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.left, self.struck = kind, at, False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not writes:
            return
        self.left -= 1
        if self.kind == "kill" and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "interrupt" and self.left == 0:
            self.struck = True
            raise KeyboardInterrupt
        if self.kind == "full" and self.left <= 0 and event not in ("os.remove", "os.rmdir"):
            self.struck = True
            raise OSError(errno.ENOSPC, "No space left on device")


def child(store: Store, kind: str, number: int) -> int:
    """0 when the job was done, 1 when it ended early as it should have, anything else is a mistake."""
    trouble = Trouble(kind, number)
    try:
        job(store, number)
    except KeyboardInterrupt:
        return 1
    except LlmoptError as error:
        return 1 if kind == "full" and "too little space" in error.message and error.hint else 3
    return 1 if trouble.struck else 0  # struck while tidying up, with the work already done


def fork(store: Store, kind: str, number: int) -> int:
    """The pid of a child; it says nothing and leaves by `_exit`."""
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        if kind == "random":
            job(store, number)
            code = 0
        else:
            code = child(store, kind, number)
    except BaseException as error:
        print(f"{kind} {number}: {error!r}", file=sys.stderr)
    os._exit(code)


def timed(store: Store, number: int) -> float:
    start = time.monotonic()
    job(store, number)
    return time.monotonic() - start


def main(root: str, kind: str, count: int) -> None:
    store, early, chance = Store(Path(root)), 0, random.Random(1)
    duration = min(timed(store, number) for number in (100_001, 100_002, 100_003))
    for number in range(1, 4 * count):
        pid = fork(store, kind, number)
        if kind == "random":
            time.sleep(chance.random() * duration)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1, -signal.SIGKILL), code
        early += code != 0
        check(store)
        if early == count or (code == 0 and kind != "random"):
            break
    made = job(store, 10_000)
    assert store.find(action(10_000).key) == made
    left = [p.name for folder in (store.root / "tmp", store.root.parent) for p in folder.glob("*[0-9]-*")]
    print(json.dumps({"children": number, "early": early, "last": code, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
