"""What a failing disk or server does to a store is found everywhere, harms nobody, and is put right from another."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers.places import Place, faults

from llmopt.artifacts import Action, Manifest, Store, attest, chunks, layout
from llmopt.artifacts.remote import Remote, transfer, verify
from llmopt.cli.app import main
from llmopt.errors import CorruptError, LlmoptError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]

CHUNK = 4096
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "large.safetensors": random.Random(5).randbytes(9 * CHUNK + 100),
    "more/large.bin": random.Random(6).randbytes(3 * CHUNK),
    "one byte": b"x",
}
KINDS = ("blobs", "chunks", "manifests", "actions", "names", "attestations")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("llmopt.artifacts.digest.CHUNK_BYTES", CHUNK)


@pytest.fixture
def action(make_action: MakeAction) -> Action:
    return make_action()


@pytest.fixture
def made(put: Put, store: Store, action: Action) -> Manifest:
    made = put(FILES, action=action, attestation=lambda made: attest(made, started=0, finished=1))
    store.set_name("best", made.id)
    store.path(made.id)
    return made


@pytest.fixture
def pushed(made: Manifest, store: Store, place: Place) -> Manifest:
    remote = Remote.open(place.url)
    transfer.push(store, made.id, remote)
    remote.set_name("best", made.id)
    return made


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """With a bit the other way, or cut off."""
    if chance.random() < 0.3:
        return data[: chance.randrange(len(data))]
    bad = bytearray(data)
    bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
    return bytes(bad)


def damages(place: Place, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Kind and key of so many objects, each damaged while it is looked at, and then as it was."""
    chance = random.Random(seed)
    found = {kind: place.keys(f"{kind}/") for kind in KINDS}
    assert all(found.values())
    for number in range(count):
        kind = KINDS[number % len(KINDS)] if number % 2 else "blobs"
        key = chance.choice(found[kind])
        good = place.read(key)
        place.write(key, spoilt(good, chance))
        yield kind, key
        place.write(key, good)


def named(ask: Callable[[str], str | None]) -> str | None:
    """What `best` stands for, None where that is said to be damaged."""
    try:
        return ask("best")
    except CorruptError as error:
        return None if "`best`" in error.message else "a message without the name"


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- found


@pytest.mark.slow
def test_damage_anywhere_in_a_store_on_disk_is_found_by_a_process_that_trusts_what_was_verified(
    store: Store, made: Manifest, action: Action
) -> None:
    """Five hundred times; what is said about an artifact does no harm beyond that."""
    good = {**FILES, "llmopt.json": made.to_bytes()}
    statements, place = store.statements(made.id), Place(url=str(store.root))
    uses: list[Callable[[Store], object]] = [
        lambda store: store.find(action.key),
        lambda store: store.path(made.id),
        lambda store: store.export(made.id, store.root / "out"),
    ]
    for kind, key in damages(place, 500, seed=1):
        fresh = Store(store.root)
        if kind in ("blobs", "manifests"):
            for use in uses:
                with pytest.raises(CorruptError) as caught:
                    use(Store(store.root))
                assert caught.value.code == 4
        else:
            assert fresh.find(action.key) == made
            assert content(fresh.path(made.id)) == good
            assert fresh.statements(made.id) == ([] if kind == "attestations" else statements)
        if kind == "names":
            assert list(fresh.broken_names()) == ["best"]
            assert named(fresh.resolve) not in (made.id, "a message without the name")
        else:
            [problem] = Store(store.root).verify(made.id)
            assert kind in ("blobs", "manifests") or key in problem
    assert Store(store.root).verify(made.id) == []


@pytest.mark.slow
def test_damage_anywhere_in_a_store_elsewhere_is_found_and_never_delivered(
    place: Place, pushed: Manifest, tmp_path: Path, action: Action
) -> None:
    remote, statements = Remote.open(place.url), Store(tmp_path / "store").statements(pushed.id)
    count = 200 if place.server is not None and place.server.name != "rclone" else 60
    for number, (kind, key) in enumerate(damages(place, count, seed=2)):
        fresh = Store(tmp_path / f"fresh-{number}")
        if kind in ("blobs", "manifests"):
            with pytest.raises(CorruptError) as caught:
                transfer.pull(fresh, pushed.id, remote)
            assert caught.value.code == 4
            assert fresh.ids() == []
        else:
            transfer.pull(fresh, pushed.id, remote)
            assert content(fresh.path(pushed.id)) == {**FILES, "llmopt.json": pushed.to_bytes()}
            assert fresh.verify(pushed.id) == []
            assert fresh.statements(pushed.id) == ([] if kind == "attestations" else statements)
            assert remote.results(action.key) == [pushed.id]
        if kind == "names":
            assert list(remote.broken_names(remote.listed())) == ["best"]
            assert named(remote.named) not in (pushed.id, "a message without the name")
        else:
            found = verify.problems(remote, pushed.id)
            digest = key.rpartition("/")[2].removesuffix(".json")
            assert list(found) == [digest if kind in ("blobs", "manifests") else key]
    assert verify.problems(remote, pushed.id) == {}


def test_what_is_pushed_over_something_damaged_is_right_there(place: Place, pushed: Manifest, store: Store) -> None:
    """A damaged manifest hides nothing: pushed again, it is whole."""
    place.write(layout.manifest(pushed.hex), b"{}")
    place.write(layout.chunks(pushed.hex), b"{")
    transfer.push(store, pushed.id, Remote.open(place.url))
    assert faults(place) == []
    assert verify.problems(Remote.open(place.url), pushed.id) == {}


def test_a_damaged_file_is_not_sent(store: Store, made: Manifest, disk_place: Place) -> None:
    here, chance = Place(url=str(store.root)), random.Random(3)
    for number, entry in enumerate(made.files):
        good = here.read(layout.blob(entry.sha256))
        here.write(layout.blob(entry.sha256), spoilt(good, chance))
        place = Place(url=f"{disk_place.url}-{number}")
        with pytest.raises(CorruptError, match="is not sent"):
            transfer.push(Store(store.root), made.id, Remote.open(place.url))
        assert place.keys("manifests/") == []
        assert faults(place) == []
        here.write(layout.blob(entry.sha256), good)


# -- a sample


def found_share(place: Place, made: Manifest, share: float, turns: int) -> float:
    remote = Remote.open(place.url)
    return sum(bool(verify.problems(remote, made.id, share=share, seed=seed)) for seed in range(turns)) / turns


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("chunk_digests", [True, False])
def test_a_sample_finds_a_damaged_place_as_often_as_it_should(
    store: Store, made: Manifest, disk_place: Place, share: float, chunk_digests: bool
) -> None:
    """Within four standard deviations; a little more often than the share, since it reads one place at least."""
    transfer.push(store, made.id, Remote.open(disk_place.url))
    if not chunk_digests:
        disk_place.delete(layout.chunks(made.hex))
    large = next(entry for entry in made.files if entry.path == "large.safetensors")
    data = bytearray(disk_place.read(layout.blob(large.sha256)))
    data[4 * CHUNK + 7] ^= 1
    disk_place.write(layout.blob(large.sha256), bytes(data))
    turns = 200
    places = sum(chunks.count(entry.size) if chunk_digests else 1 for entry in made.files)
    files = len(made.files)
    of_large = chunks.count(large.size) if chunk_digests else 1
    expected = share + (1 - share) ** places / files / of_large
    deviation = math.sqrt(expected * (1 - expected) / turns)
    assert abs(found_share(disk_place, made, share, turns) - expected) < 4 * deviation


def test_a_sample_finds_what_is_missing_or_of_another_size_every_time(
    store: Store, made: Manifest, disk_place: Place
) -> None:
    transfer.push(store, made.id, Remote.open(disk_place.url))
    key = layout.blob(made.files[0].sha256)
    disk_place.write(key, b"other")
    assert found_share(disk_place, made, 0.01, 20) == 1
    disk_place.delete(key)
    assert found_share(disk_place, made, 0.01, 20) == 1


# -- put right


@pytest.fixture
def llmopt(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, dict[str, object]]]]:
    """llmopt("store", "verify", ...) -> exit code, and what `--json` printed."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, dict[str, object]]:
        capfd.readouterr()
        code = main([*arguments, "--json"])
        output = capfd.readouterr().out
        return code, json.loads(output) if output.startswith("{") else {}

    yield run
    signal.signal(signal.SIGTERM, before)


def break_(place: Place, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    if kind == "all":
        for each in KINDS:
            break_(place, each, seed)
        return
    if kind == "missing blob":
        place.delete(chance.choice(place.keys("blobs/")))
        return
    key = chance.choice(place.keys(f"{kind}/"))
    place.write(key, spoilt(place.read(key), chance))


DAMAGES = (*KINDS, "missing blob", "all")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_store_on_disk_is_repaired_from_another(
    store: Store, pushed: Manifest, place: Place, kind: str, llmopt: Callable[..., tuple[int, dict[str, object]]]
) -> None:
    here = Place(url=str(store.root))
    before = {key: here.read(key) for key in here.all() if key.partition("/")[0] in KINDS}
    for seed in range(1 if place.server else 2):
        break_(here, kind, seed)
        assert llmopt("store", "verify", "--store", here.url)[0] == 4
        code, report = llmopt("store", "verify", "--store", here.url, "--repair-from", place.url)
        assert code == 0, report
        assert report["repaired"]
        assert {key: here.read(key) for key in before} == before
        assert llmopt("store", "verify", "--store", here.url)[0] == 0


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_store_on_s3_is_repaired_from_one_on_disk(
    s3_place: Place,
    store: Store,
    made: Manifest,
    kind: str,
    llmopt: Callable[..., tuple[int, dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = Remote.open(s3_place.url)
    transfer.push(store, made.id, remote)
    remote.set_name("best", made.id)
    before = {key: s3_place.read(key) for key in s3_place.all() if key.partition("/")[0] in KINDS}
    break_(s3_place, kind, 1)
    assert llmopt("store", "verify", "--store", s3_place.url)[0] == 4
    code, report = llmopt("store", "verify", "--store", s3_place.url, "--repair-from", str(store.root))
    assert code == 0, report
    assert report["repaired"]
    assert {key: s3_place.read(key) for key in before} == before


def test_what_the_other_store_has_damaged_too_is_not_said_to_be_repaired(
    store: Store, made: Manifest, disk_place: Place, llmopt: Callable[..., tuple[int, dict[str, object]]]
) -> None:
    transfer.push(store, made.id, Remote.open(disk_place.url))
    for place in (disk_place, Place(url=str(store.root))):
        key = layout.blob(made.files[0].sha256)
        place.write(key, b"y" * len(place.read(key)))
    assert llmopt("store", "verify", "--store", str(store.root), "--repair-from", disk_place.url)[0] == 4
    with pytest.raises(LlmoptError):
        Store(store.root).path(made.id)


@pytest.mark.parametrize("command", ["verify", "export", "pull"])
def test_no_command_ends_well_with_damaged_bytes(
    store: Store,
    made: Manifest,
    disk_place: Place,
    command: str,
    tmp_path: Path,
    llmopt: Callable[..., tuple[int, dict[str, object]]],
) -> None:
    transfer.push(store, made.id, Remote.open(disk_place.url))
    for number, place in enumerate((disk_place, Place(url=str(store.root)))):
        key = layout.blob(made.files[1].sha256)
        place.write(key, spoilt(place.read(key), random.Random(number)))
    arguments = {
        "verify": ["verify", made.id, "--store", str(store.root)],
        "export": ["export", made.id, str(tmp_path / "out"), "--store", str(store.root)],
        "pull": ["pull", made.id, disk_place.url, "--store", str(tmp_path / "new")],
    }[command]
    assert llmopt("store", *arguments)[0] == 4
    assert not (tmp_path / "out").exists()
    assert Store(tmp_path / "new").ids() == []
