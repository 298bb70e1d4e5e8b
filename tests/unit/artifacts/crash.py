"""Run by test_crash.py: a job in a child process that comes to grief at a chosen point.

    crash.py STORE kill|interrupt|full|random COUNT [put|pull|push|gc|evict [EVERY]]

A child does the whole job once for each point: `kill` dies by SIGKILL before its n-th change of the file system,
`interrupt` gets a KeyboardInterrupt there, `full` finds the disk full from there on, up to COUNT points or the end of
the job, EVERY so many of them; `random` is killed after a random time, until COUNT were. After each the store, and the
folder `there` that is pushed to and pulled from, are checked, and at the end the job is done once more. Prints one JSON
object: how many children, how many of them ended early, and what is left that nobody needs.
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

from llmopt.artifacts import Action, Manifest, Store, attest, layout
from llmopt.artifacts.local import collect_local, evict
from llmopt.artifacts.remote import Remote, collect, transfer
from llmopt.errors import LlmoptError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from servers.places import Place, faults

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"}


def action(number: int) -> Action:
    return Action(op="quantize.rtn", op_version=1, inputs={}, settings={"number": number}, code="", deps={}, target={})


def make(store: Store, number: int) -> Manifest:
    with store.stage() as folder:
        (folder / "sub").mkdir()
        (folder / "common").write_bytes(b"the same in all")
        (folder / "sub" / "own").write_bytes(str(number).encode() * 50_000)
        return store.put(
            folder,
            kind="model",
            action=action(number),
            attestation=lambda manifest: attest(manifest, started=0, finished=1),
        )


def put(store: Store, number: int) -> Manifest:
    """Every write that the store can do by itself."""
    made = make(store, number)
    store.set_name("latest", made.id)
    store.path(made.id)
    store.export(made.id, store.root.parent / f"out-{number}")
    return made


def there(store: Store) -> Remote:
    return Remote.open(str(store.root.parent / "there"))


def source(store: Store, number: int) -> Manifest:
    """An artifact in a store of its own."""
    return make(Store(store.root.parent / "source"), number)


def prepare_pull(store: Store, number: int) -> None:
    from_ = Store(store.root.parent / "source")
    transfer.push(from_, source(store, number).id, there(store))


def pull(store: Store, number: int) -> None:
    transfer.pull(store, artifact_of(store.root.parent / "source", number), there(store))


def push(store: Store, number: int) -> None:
    remote = there(store)
    artifact = artifact_of(store.root.parent / "source", number)
    transfer.push(Store(store.root.parent / "source"), artifact, remote)
    remote.set_name("latest", artifact)


def artifact_of(root: Path, number: int) -> str:
    [artifact] = Store(root).results(action(number).key)
    return artifact


def prepare_gc(store: Store, number: int) -> None:
    """One that is named, one that is not and one that was made from it."""
    for each in range(3):
        own = Store(store.root)
        made = make(own, 10 * number + each)
        own.path(made.id)
        if each == 0:
            own.set_name("latest", made.id)


def gc(store: Store, number: int) -> None:
    collect_local(Store(store.root), older_than_s=0)


def prepare_evict(store: Store, number: int) -> None:
    for each in range(2):
        own = Store(store.root)
        made = make(own, 10 * number + each)
        own.path(made.id)
        transfer.push(own, made.id, there(store))
    (store.root / "size").unlink(missing_ok=True)  # so that it is counted


def evict_all(store: Store, number: int) -> None:
    evict(Store(store.root), 0, there(store), raise_)


def raise_(line: str, **more: Any) -> None:
    assert "larger than it should be" not in line or "space" in line, line


JOBS = {
    "put": (None, put),
    "pull": (prepare_pull, pull),
    "push": (source, push),
    "gc": (prepare_gc, gc),
    "evict": (prepare_evict, evict_all),
}


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
    found = faults(Place(url=str(store.root))) + faults(Place(url=str(store.root.parent / "there")))
    assert not found, found
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


def child(store: Store, kind: str, number: int, job: str) -> int:
    """0 when the job was done, 1 when it ended early as it should have, anything else is a mistake."""
    trouble = Trouble(kind, number)
    try:
        JOBS[job][1](store, number)
    except KeyboardInterrupt:
        return 1
    except LlmoptError as error:
        return 1 if kind == "full" and "too little space" in error.message and error.hint else 3
    return 1 if trouble.struck else 0  # struck while tidying up, with the work already done


def fork(store: Store, kind: str, number: int, job: str) -> int:
    """The pid of a child; it says nothing and leaves by `_exit`."""
    prepare = JOBS[job][0]
    if prepare is not None:
        prepare(store, number)
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        if kind == "random":
            JOBS[job][1](store, number)
            code = 0
        else:
            code = child(store, kind, number, job)
    except BaseException as error:
        print(f"{kind} {number}: {error!r}", file=sys.stderr)
    os._exit(code)


def timed(store: Store, number: int, job: str) -> float:
    prepare, work = JOBS[job]
    if prepare is not None:
        prepare(store, number)
    start = time.monotonic()
    work(store, number)
    return time.monotonic() - start


def left_over(store: Store) -> list[str]:
    """What no artifact needs, a day later: nothing of it is to be left."""
    collect.STRAY_S = 0.0
    found = []
    for root in (store.root, store.root.parent / "there"):
        if root.exists():
            if root.name == "there":
                time.sleep(0.02)  # what was written within this tick is not old yet
                Remote.open(str(root)).set_name("latest", next(iter(Remote.open(str(root)).listed())))
            for lease in (root / "leases").glob("*-*"):
                os.utime(lease, (0, 0))
            collect_local(Store(root), older_than_s=0)
            kept = [Store(root).get(artifact) for artifact in Store(root).ids()]
            needed = {layout.blob(entry.sha256) for made in kept for entry in made.files}
            place = Place(url=str(root))
            named = {made.hex for made in kept}
            found += sorted(set(place.keys("blobs/")) - needed)
            found += [key for folder in ("tmp/", "begun/") for key in place.keys(folder)]
            about = [*place.keys("trees/"), *place.keys("leases/")]
            found += [key for key in about if key.split("/")[1] not in named]
    found += [p.name for p in store.root.parent.glob(".*[0-9]-*")]
    return [name for name in found if name not in ("leases/.gate", "leases/.writers", "leases/.swap")]


def main(root: str, kind: str, count: int, job: str = "put", every: str = "1") -> None:
    store, early, chance = Store(Path(root)), 0, random.Random(1)
    duration = min(timed(store, number, job) for number in (100_001, 100_002, 100_003))
    for number in range(1, 4 * count, int(every)):
        pid = fork(store, kind, number, job)
        if kind == "random":
            time.sleep(chance.random() * duration)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1, -signal.SIGKILL), code
        early += code != 0
        check(store)
        if job in ("gc", "evict"):  # each finds the same to do
            timed(store, 100_000, job)
        if early == count or (code == 0 and kind != "random"):
            break
    timed(store, 200_000, job)
    check(store)
    if job == "put":
        assert store.find(action(200_000).key) is not None
    left = [p.name for folder in (store.root / "tmp", store.root.parent) for p in folder.glob("*[0-9]-*")]
    del store.leases  # what this process put is not its own any more
    left += left_over(Store(Path(root)))
    children = len(range(1, number + 1, int(every)))
    print(json.dumps({"children": children, "early": early, "last": code, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
