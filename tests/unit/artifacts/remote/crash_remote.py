"""Run by test_remote_crash.py: push, pull, or remove in a child process that is killed as it talks to an S3 server.

    crash_remote.py FOLDER URL SERVER JOB EVERY RANDOM

SERVER is the test's `Server` as JSON; the bucket of URL is there. The child is killed (SIGKILL) when its n-th request
has reached a proxy in between and is not passed on; and, another time, when the server has answered it and the child
has not heard; for every EVERY-th n up to the end of the job. Then RANDOM children are killed after a random time. After
each, what lies there is checked by nothing but its bytes, the job is done once more, now in peace, and all is checked
again. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from llmopt.artifacts import Action, Manifest, Store, attest, chunks, digest, objects
from llmopt.artifacts.remote import Remote, collect, sending, transfer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from servers import Hang, Proxy, Server
from servers.places import Place, faults
from servers.proxy import Exchange

#: The least that S3 allows of a part, and chunks to match, so that a file of 5 MiB goes in two parts.
PART_BYTES = 5 << 20
objects.PART_BYTES = sending.PART_BYTES = PART_BYTES
chunks.CHUNK_BYTES = digest.CHUNK_BYTES = 2 << 20


def make(store: Store, name: str) -> Manifest:
    action = Action(op="x", op_version=1, inputs={}, settings={"name": name}, code="", deps={}, target={})
    with store.stage() as folder:
        (folder / "small").write_bytes(b"small")
        (folder / "other").write_bytes(name.encode() * 1000)
        (folder / "large").write_bytes((name.encode() * PART_BYTES)[: PART_BYTES + 1000])
        return store.put(
            folder, kind="model", action=action, attestation=lambda made: attest(made, started=0, finished=1)
        )


class Case:
    """A fresh prefix for each child."""

    def __init__(self, folder: Path, url: str, server: Server, job: str) -> None:
        self.place = Place(url=f"{url}/{folder.name}", server=server)
        self.folder, self.job = folder, job
        self.store = Store(folder / "store")
        self.made = make(self.store, "a")
        self.other = make(self.store, "b") if job == "gc" else self.made

    def prepare(self) -> None:
        remote = Remote.open(self.place.url)
        if self.job != "push":
            transfer.push(self.store, self.made.id, remote)
        if self.job == "gc":
            transfer.push(self.store, self.other.id, remote)
            remote.set_name("best", self.made.id)

    def work(self) -> None:
        remote = Remote.open(self.place.url)
        if self.job == "push":
            transfer.push(self.store, self.made.id, remote)
            remote.set_name("best", self.made.id)
        elif self.job == "pull":
            transfer.pull(Store(self.folder / "pulled"), self.made.id, remote)
        else:
            collect.collect(remote, older_than_s=0)

    def check(self) -> None:
        found = faults(self.place)
        pulled = Store(self.folder / "pulled")
        found += faults(Place(url=str(pulled.root)))
        found += [problem for artifact in pulled.ids() for problem in pulled.verify(artifact)]
        assert not found, found

    def in_peace(self) -> None:
        """Once more, a day later: leases have run out, and strays are old."""
        for lease in self.place.keys("leases/"):
            self.place.delete(lease)

        def work() -> None:
            collect.STRAY_S = -5.0
            self.work()

        assert finished(fork(work)) == 0
        self.check()
        if self.job == "pull":
            assert Store(self.folder / "pulled").ids() == [self.made.id]
        else:
            assert self.place.keys("names/") == ["names/best"]
            assert self.place.keys("manifests/") == [f"manifests/sha256/{self.made.hex}.json"]
        if self.job == "gc":
            assert len(self.place.keys("blobs/")) == 3
            assert len(self.place.keys("actions/")) == len(self.place.keys("attestations/")) == 1


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Killer:
    """Kills the child at its n-th request: before the server hears of it, or when the server has answered."""

    def __init__(self, proxy: Proxy, at: int, heard: bool) -> None:
        self.pid, self.left, self.struck = 0, at, threading.Event()
        self.proxy, self.heard = proxy, heard
        self.target: Exchange | None = None
        proxy.heal()
        proxy.fail(match=self, with_=Hang(forward=heard), times=1)

    def __call__(self, request: Exchange) -> bool:
        self.left -= 1
        if self.left:
            return False
        self.target = request
        self.struck.set()
        return True

    def run(self, work: Callable[[], None]) -> int:
        """How the child ended."""
        pid = fork(work)
        while not self.struck.wait(0.005):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        give_up = time.monotonic() + 10
        while self.heard and self.target is not None and self.target.status is None and time.monotonic() < give_up:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        return finished(pid)


def main(folder: Path, url: str, server: Server, job: str, every: int, at_random: int) -> None:
    killed = requests = 0
    chance = random.Random(1)
    with Proxy(server) as proxy:

        def through_proxy(case: Case) -> None:
            os.environ.update(proxy.server.environ())
            case.work()

        def case_of(name: str) -> Case:
            (folder / name).mkdir(parents=True)
            case = Case(folder / name, url, server, job)
            assert finished(fork(case.prepare)) == 0
            return case

        def after(case: Case, code: int) -> None:
            assert code in (0, -signal.SIGKILL), code
            case.check()
            case.in_peace()

        for heard in (False, True):
            for at in range(1, 400, every):
                case = case_of(f"{job}-{at}-{heard}")
                code = Killer(proxy, at, heard).run(lambda case=case: through_proxy(case))
                after(case, code)
                if code == 0:
                    break
                requests = max(requests, at)
                killed += 1
        proxy.heal()
        case = case_of(f"{job}-whole")
        begin_s = time.monotonic()
        assert finished(fork(case.work)) == 0
        duration_s = time.monotonic() - begin_s
        for number in range(at_random):
            case = case_of(f"{job}-random-{number}")
            pid = fork(case.work)
            time.sleep(chance.random() * duration_s)
            os.kill(pid, signal.SIGKILL)
            code = finished(pid)
            killed += code != 0
            after(case, code)
    print(json.dumps({"job": job, "killed": killed, "requests": requests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Server(**json.loads(sys.argv[3])), sys.argv[4], *map(int, sys.argv[5:7]))
