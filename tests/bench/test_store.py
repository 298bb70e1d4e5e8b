"""The store beside what the machine can do: cp, sha256, bare obstore and boto3, each pair in turn and as a ratio.

LLMOPT_BENCH_STORE_BYTES (2e9) sizes it, LLMOPT_BENCH_STORE_ROUNDS (3) says how often. Sizes below 1e9 are a look: the
figures are printed, and nothing is asserted of speed. S3 is Ceph's; boto3 has a venv of its own (`make bench-store`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from generate import Shape, generate
from rounds import Rounds
from servers import Proxy, Server
from servers.ceph import Ceph

from llmopt.artifacts.digest import at_once
from llmopt.artifacts.store import Store

pytestmark = [pytest.mark.bench, pytest.mark.timeout(2 * 3600)]

ROOT = Path(__file__).resolve().parents[2]
SIZE_BYTES = int(float(os.environ.get("LLMOPT_BENCH_STORE_BYTES", "2e9")))
ROUNDS = int(os.environ.get("LLMOPT_BENCH_STORE_ROUNDS", "3"))
FULL = SIZE_BYTES >= 1e9  # else everything is over before it has a speed
LARGE, SMALL, SMALL_BYTES = 20, 500 if FULL else 50, 100_000
FLIPS = 500
CLIENT = Path(__file__).with_name("peers") / "run_s3_client.py"
BOTO3 = ROOT / ".venv-boto3" / "bin" / "python"

Way = Callable[[], tuple[float, float]]


@pytest.fixture(scope="module", autouse=True)
def _no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twenty files of noise, as a checkpoint's shards."""
    folder = tmp_path_factory.mktemp("large") / "files"
    yield _noise(folder, LARGE, SIZE_BYTES // LARGE)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("small") / "files"
    yield _noise(folder, SMALL, SMALL_BYTES)
    shutil.rmtree(folder)


def _noise(folder: Path, count: int, size: int) -> Path:
    folder.mkdir()
    source = random.Random(count)
    for number in range(count):
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            for at in range(0, size, 1 << 24):
                file.write(source.randbytes(min(1 << 24, size - at)))
    return folder


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those that it waited for."""
    before, begin = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - begin, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


class Verdict:
    """Prints what was measured; of a full run, what was to be is asserted at the end."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def __call__(
        self, what: str, figure: float, *, least: float | None = None, most: float | None = None, excused: bool = False
    ) -> None:
        """`excused`: that it is missed is told, and is no failure."""
        wanted = f"(>= {least})" if least is not None else f"(<= {most})" if most is not None else ""
        if not FULL:
            wanted = ""
        elif (least is not None and figure < least) or (most is not None and figure > most):
            wanted += " missed"
            self.missed += [] if excused else [f"{what}: {figure:.2f}"]
        print(f"  {what:64} {figure:6.2f}   {wanted}".rstrip())

    def end(self) -> None:
        assert not self.missed, self.missed


def llmopt(*arguments: str | Path, before: Sequence[str | Path] = (), **environ: str) -> str:
    done = subprocess.run(
        [*before, Path(sys.executable).with_name("llmopt"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- on this disk


def test_local_put(large: Path, tmp_path: Path) -> None:
    from llmopt.artifacts import exchange

    copies, store, staged_store = tmp_path / "copies", tmp_path / "store", Store(tmp_path / "staged")
    files = sorted(large.iterdir())

    def cp() -> tuple[float, float]:
        def work() -> None:
            subprocess.run(["cp", "-r", large, copies], check=True)
            subprocess.run(["sync", "--data", *copies.iterdir()], check=True)

        figures = timed(work)
        shutil.rmtree(copies)
        return figures

    def imported(work: Callable[[], object]) -> tuple[float, float]:
        figures = timed(work)
        shutil.rmtree(store)
        return figures

    def staged(*, synced: bool) -> tuple[float, float]:
        with staged_store.stage() as folder:
            for file in files:
                shutil.copyfile(file, folder / file.name)
            if synced:
                os.sync()
            return timed(lambda: staged_store.put(folder, kind="model"))

    def put(*, synced: bool) -> tuple[float, float]:
        figures = staged(synced=synced)
        shutil.rmtree(staged_store.root)
        return figures

    def hashed() -> None:
        with ThreadPoolExecutor(at_once()) as threads:
            list(threads.map(_sha256, files))

    ways: dict[str, Way] = {
        "cp and fdatasync": cp,
        "store.take, in this process": lambda: imported(lambda: exchange.take(Store(store), str(large))),
        "`llmopt store import`": lambda: imported(lambda: llmopt("store", "import", large, "--store", store)),
        f"hashlib's sha256, {at_once()} threads": lambda: timed(hashed),
        "sha256sum": lambda: timed(lambda: subprocess.run(["sha256sum", *files], check=True, capture_output=True)),
        "Store.put, staged and synced": lambda: put(synced=True),
        "Store.put, just written": lambda: put(synced=False),
    }
    rounds = Rounds.of(ways, ROUNDS + 2)
    copy, take, command, hashing, program, adopted, fresh = ways
    print(f"\n{SIZE_BYTES / 1e6:.0f} MB as {LARGE} files, on this disk")
    print("\n".join(rounds.line(way, SIZE_BYTES / 1e6, "MB/s") for way in ways))
    verdict = Verdict()
    verdict("import beside cp and fdatasync", rounds.speed(take, copy), least=0.85)
    verdict("import beside cp and fdatasync, whole processes", rounds.speed(command, copy), least=0.85)
    verdict(f"adopting by link beside sha256, {at_once()} threads each", rounds.speed(adopted, hashing), least=0.9)
    verdict("adopting by link beside sha256sum", rounds.speed(adopted, program), least=0.9)
    verdict("adopting what is not on the disk yet beside cp and fdatasync", rounds.speed(fresh, copy))
    verdict.end()


def _sha256(file: Path) -> str:
    with file.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- on S3


@pytest.mark.parametrize("nodelay", [True, False], ids=["tcp_nodelay", "as-debian-starts-it"])
@pytest.mark.parametrize("kind", ["large", "small"])
def test_s3(
    kind: str,
    nodelay: bool,
    ceph: Server,
    ceph_cluster: Ceph,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As nobody has configured it, Ceph waits 40 ms for an acknowledgement within its answers, as a network does."""
    if not BOTO3.exists():
        pytest.skip("`make bench-store` makes the venv with boto3")
    if kind == "large" and not nodelay:
        pytest.skip("makes no difference")
    ceph_cluster.kill_gateway()
    ceph_cluster.start_gateway(nodelay=nodelay)
    ceph.set_in(monkeypatch)
    folder: Path = request.getfixturevalue(kind)
    files = {f"files/{file.name}": file for file in sorted(folder.iterdir())}
    store = Store(tmp_path / "store")
    artifact = _stored(store, folder)
    fetched = tmp_path / "fetched"
    count, size = len(files), sum(file.stat().st_size for file in files.values())
    clients = {"llmopt": sys.executable, "obstore": sys.executable, "boto3": BOTO3}
    streams = 4 if kind == "large" else 16

    def transfer(client: str, way: str, bucket: str) -> tuple[float, float]:
        job: dict[str, Any] = {"client": client, "way": way, "bucket": bucket, "at_once": streams, "artifact": artifact}
        if way == "up":
            job |= {"store": str(store.root), "objects": {key: str(file) for key, file in files.items()}}
        else:
            fetched.mkdir()
            objects = {key: str(fetched / file.name) for key, file in files.items()}
            job |= {"store": str(fetched / "store"), "objects": objects}
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [clients[client.partition(" ")[0]], CLIENT, tmp_path / "job.json"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        figures = json.loads(done.stdout)
        return figures["seconds"], figures["process_cpu_s"]

    buckets = dict.fromkeys(clients, "")

    def up(client: str) -> tuple[float, float]:
        if buckets[client]:
            ceph_cluster.remove_bucket(buckets[client])
        buckets[client] = ceph.new_bucket()
        return transfer(client, "up", buckets[client])

    def down(client: str) -> tuple[float, float]:
        figures = transfer(client, "down", buckets[client.partition(" ")[0]])
        shutil.rmtree(fetched)
        return figures

    up("obstore")  # the first to write to a cluster waits until it has made its pools
    unit, amount = ("MB/s", size / 1e6) if kind == "large" else ("files/s", count)
    verdict = Verdict()
    bare, peer = (0.9, 1.0) if kind == "large" else (None, 3.0)
    for way, go in (("up", up), ("down", down)):
        others = ["obstore and sha256"] if way == "down" else []
        rounds = Rounds.of({client: partial(go, client) for client in [*clients, *others]}, ROUNDS)
        server = "Ceph" if nodelay else "Ceph without tcp_nodelay, its default"
        print(f"\n{count} files of {size // count / 1e6:.1f} MB on {server}, {way}")
        print("\n".join(rounds.line(client, amount, unit) for client in rounds.seconds))
        verdict(f"{way}: llmopt beside bare obstore", rounds.speed("llmopt", "obstore"), least=bare)
        for other in others:
            verdict(f"{way}: llmopt beside {other}", rounds.speed("llmopt", other), least=bare)
        server_bound = peer > rounds.speed("obstore", "boto3")  # then nobody can
        verdict(f"{way}: bare obstore beside boto3", rounds.speed("obstore", "boto3"))
        verdict(f"{way}: llmopt beside boto3", rounds.speed("llmopt", "boto3"), least=peer, excused=server_bound)
        cpu = statistics.median(a / b for a, b in zip(rounds.cpu_s["boto3"], rounds.cpu_s["llmopt"], strict=True))
        verdict(f"{way}: CPU of boto3 beside that of llmopt", cpu)
    with Proxy(ceph) as proxy:
        proxy.server.set_in(monkeypatch)
        llmopt("store", "push", artifact, f"s3://{buckets['llmopt']}/store", "--store", store.root)
        sent = sum(each.request_bytes for each in proxy.exchanges if "/blobs/" in each.path)
        print(f"  a second push: {sent} bytes of payload; {proxy.count()} requests with {proxy.sent_bytes()} bytes")
        assert sent == 0
    for bucket in buckets.values():
        ceph_cluster.remove_bucket(bucket)
    verdict.end()


def _stored(store: Store, folder: Path) -> str:
    from llmopt.artifacts import exchange

    return exchange.take(store, str(folder)).manifest.id


# -- a cache hit


PIPELINE = """\
model: bench-store
quantize: {method: rtn, bits: 8}
compile: {target: openvino}
bench: {concurrency: [1], requests: 2, warmup: 0, prompt_tokens: 8, output_tokens: 8}
"""


def _shape(size_bytes: int) -> Shape:
    """A Llama that is half of that: what is made of it at 8 bits is a quarter twice."""
    hidden = 1024 if FULL else 256
    block = 2 * (2.5 * hidden * hidden + 12 * hidden * hidden)
    return Shape(
        hidden=hidden,
        mlp=4 * hidden,
        heads=hidden // 128,
        kv_heads=hidden // 512 or 1,
        vocab=2048,
        layers=max(2, round(size_bytes / 2 / block)),
    )


def test_a_hit(tmp_path: Path) -> None:
    generate(tmp_path / "model", _shape(SIZE_BYTES), shard_bytes=1 << 28)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    store = tmp_path / "store"
    llmopt("store", "import", tmp_path / "model", "--name", "bench-store", "--store", store)
    shutil.rmtree(tmp_path / "model")
    arguments = ("run", tmp_path / "pipeline.yaml", "--store", store, "--json")
    llmopt(*arguments)
    stored = [file for file in (store / "blobs").rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in stored)

    def hit(*more: str) -> tuple[float, float]:
        told: list[Mapping[str, Any]] = []
        figures = timed(lambda: told.append(json.loads(llmopt(*arguments, *more))))
        assert all(stage["cached"] for stage in told[0]["stages"])
        return figures

    def once() -> None:
        for file in stored:
            _sha256(file)

    ways: dict[str, Way] = {
        "a hit": hit,
        "a hit, --verify full": lambda: hit("--verify", "full"),
        "sha256sum": lambda: timed(lambda: subprocess.run(["sha256sum", *stored], check=True, capture_output=True)),
        "hashlib's sha256, 1 thread": lambda: timed(once),
    }
    rounds = Rounds.of(ways, ROUNDS + 2)
    print(f"\nllmopt run, 3 stages and their checkpoint in the store, {size / 1e6:.0f} MB as {len(stored)} blobs")
    print("\n".join(rounds.line(way, size / 1e6, "MB/s") for way in ways))
    verdict = Verdict()
    verdict("CPU s of a hit", min(rounds.cpu_s["a hit"]), most=0.4)
    for other in ("sha256sum", "hashlib's sha256, 1 thread"):
        verdict(f"time of --verify full beside {other}", 1 / rounds.speed("a hit, --verify full", other), most=1.2)
    if shutil.which("strace"):
        opened = _opened(store, arguments, tmp_path / "strace")
        read = _opened(store, (*arguments, "--verify", "full"), tmp_path / "strace")
        print(f"  blobs opened by a hit: {len(opened)}; by one with --verify full: {len(read)} of {len(stored)}")
        assert len(read) > len(opened) == 0
    verdict.end()


def _opened(store: Path, arguments: Sequence[str | Path], log: Path) -> set[Path]:
    """The blobs, under whatever name, that a command opens, by what the kernel was asked."""
    llmopt(*arguments, before=("strace", "-f", "-e", "trace=open,openat,openat2", "-o", log))
    found = {Path(match[1]) for match in re.finditer(r'"([^"]+)", [^)]*\) = \d', log.read_text())}
    inside = [path for path in found if path.is_relative_to(store / "blobs") or path.is_relative_to(store / "trees")]
    return {path for path in inside if path.is_file()}


# -- what is damaged


def test_flips(tmp_path: Path) -> None:
    """A bit anywhere, in files of one chunk and of several, in the manifest too: each is found."""
    store, chance = Store(tmp_path / "store"), random.Random(0)
    with store.stage() as folder:
        for name, size in (("small", 10_000), ("large", 40 << 20), ("tiny", 1)):
            (folder / name).write_bytes(chance.randbytes(size))
        manifest = store.put(folder, kind="model")
    places = [store.blobs.path(entry.sha256) for entry in manifest.files]
    places.append(store.root / "manifests" / "sha256" / f"{manifest.hex}.json")
    found = 0
    for number in range(FLIPS):
        file = places[number % len(places)]
        at, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
        file.chmod(0o644)
        with file.open("r+b") as opened:
            for _ in range(2):  # and back
                opened.seek(at)
                byte = opened.read(1)[0]
                opened.seek(at)
                opened.write(bytes([byte ^ bit]))
                opened.flush()
                if _ == 0:
                    found += bool(Store(store.root).verify(manifest.id))
    assert not Store(store.root).verify(manifest.id)
    print(f"\nflipped bits that `llmopt store verify` found: {found} of {FLIPS}")
    assert found == FLIPS
