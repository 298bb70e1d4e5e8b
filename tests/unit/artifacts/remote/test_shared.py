"""A store with another behind it: what is not here is had from there, and what is wrong there harms nobody."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from servers import Answer, Hang, Proxy, Server
from servers.places import Place

from llmopt.artifacts import Action, Manifest, Store, attest, layout
from llmopt.artifacts.outcome import Json
from llmopt.artifacts.remote import Remote, transfer
from llmopt.artifacts.remote.shared import S3Store, SharingStore, open_store
from llmopt.artifacts.trust.keys import SigningKey
from llmopt.artifacts.trust.signing import sign
from llmopt.errors import CorruptError, LlmoptError, SettingsError

Put = Callable[..., Manifest]
MakeAction = Callable[..., Action]
OURS, THEIRS = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32), f"key-{n}") for n in (1, 2))
WRITES = ("PUT", "POST", "DELETE")


class Told(list[str]):
    """A progress that remembers its lines."""

    def __call__(self, line: str, /, **facts: Json) -> None:
        if "watched" not in facts:
            self.append(line)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def shared(tmp_path: Path, told: Told) -> Callable[..., SharingStore]:
    """shared("mine", place, push=True) -> a store on this disk that shares a cache."""

    def make(name: str, place: Place, **how: Any) -> SharingStore:
        store = open_store(str(tmp_path / name), remote=place.url, progress=told, **how)
        assert isinstance(store, SharingStore)
        return store

    return make


@pytest.fixture
def owned(s3_place: Place, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Store]:
    """owned("machine-1") -> the store in the place, with this machine's cache."""

    def make(machine: str, **how: Any) -> S3Store:
        with monkeypatch.context() as patch:
            patch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / machine)
            store = open_store(s3_place.url, progress=told, **how)
        assert isinstance(store, S3Store)
        return store

    return make


@pytest.fixture
def proxy(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between this process and rclone."""
    with Proxy(rclone) as between:
        between.server.set_in(monkeypatch)
        yield between


@pytest.fixture
def watched(proxy: Proxy, new_s3_place: Callable[[Server], Place]) -> Place:
    """A place behind the proxy; what a test does there itself does not pass it."""
    return replace(new_s3_place(proxy.server), server=proxy.upstream)


def signed_by(key: SigningKey) -> Callable[[Manifest], dict[str, Json]]:
    return lambda manifest: sign(attest(manifest, started=1, finished=2, command=["llmopt"]), key)


def spoil(place: Place, key: str) -> None:
    data = place.read(key)
    place.write(key, data[:-1] + bytes([data[-1] ^ 1]))


def spoil_here(store: Store, key: str) -> None:
    spoil(Place(url=str(store.root)), key)
    store.blobs._verified._marks.clear()


# -- a cache that several machines share


def test_what_a_colleague_made_is_used_and_not_made_again(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action(), attestation=signed_by(OURS))
    ci = shared("ci", place)
    assert ci.find(make_action().key) == made
    assert (ci.path(made.id) / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert ci.envelopes(made.id)
    alone = Store(ci.root)
    assert alone.find(make_action().key) == made
    assert alone.verify(made.id) == []


def test_without_push_nothing_is_written_there(
    watched: Place, proxy: Proxy, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    store = shared("mine", watched)
    assert store.find(make_action().key) is None
    made = put(into=store, action=make_action())
    assert store.find(make_action().key) == made
    store.set_name("best", made.id)
    store.path(made.id)
    assert proxy.count(*WRITES) == 0
    assert watched.all() == []


def test_a_hit_here_is_pushed_if_it_is_not_there_and_only_then(
    watched: Place, proxy: Proxy, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    made = put(into=shared("mine", watched), action=make_action())
    pushing = shared("mine", watched, push=True)
    assert pushing.find(make_action().key) == made
    assert Remote.open(watched.url).has(made.id)
    proxy.forget()
    assert pushing.find(make_action().key) == made
    assert proxy.count(*WRITES) == 0
    assert proxy.count() == 1


def test_a_fetched_result_is_not_sent_back(
    watched: Place, proxy: Proxy, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    put(into=shared("colleague", watched, push=True), action=make_action(), attestation=signed_by(OURS))
    other = shared("mine", watched, push=True)
    proxy.forget()
    assert other.find(make_action().key) is not None
    assert proxy.count(*WRITES) == 0


def test_an_id_or_a_name_of_there_is_known_here(
    place: Place, shared: Callable[..., SharingStore], put: Put, store: Store
) -> None:
    made = put()
    transfer.push(store, made.id, remote := Remote.open(place.url))
    remote.set_name("best", made.id)
    ci = shared("ci", place)
    for reference in (made.id, made.hex, made.hex[:8], f"sha256:{made.hex[:12]}", "best"):
        assert ci.resolve(reference) == made.id
    assert ci.resolve("nothing") is None
    assert ci.get(made.id) == made
    assert not ci.has(made.id)
    assert ci.read(made, "config.json") == b'{"model_type": "llama"}'
    ci.export(made.id, ci.root.parent / "copy")
    assert (ci.root.parent / "copy" / "config.json").exists()


def test_what_is_nowhere_is_an_error_that_names_the_store(place: Place, shared: Callable[..., SharingStore]) -> None:
    store = shared("mine", place)
    with pytest.raises(LlmoptError, match="no artifact") as caught:
        store.path("sha256:" + "0" * 64)
    assert caught.value.hint == "see `llmopt store ls`"


def test_a_cache_that_is_down_is_done_without_and_told_once(
    watched: Place,
    proxy: Proxy,
    shared: Callable[..., SharingStore],
    put: Put,
    make_action: MakeAction,
    told: Told,
) -> None:
    store = shared("mine", watched, push=True)
    proxy.fail(with_=Answer(status=403, code="AccessDenied"), times=None)
    assert store.find(make_action().key) is None
    made = put(into=store, action=make_action())
    assert store.find(make_action().key) == made
    store.path(made.id)
    [line] = told
    assert line.startswith(f"going on without the shared cache `{watched.url}`: ")
    assert proxy.count() == 1


def test_a_cache_that_hangs_is_not_waited_for(
    watched: Place,
    proxy: Proxy,
    shared: Callable[..., SharingStore],
    make_action: MakeAction,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmopt.artifacts.remote.shared._PATIENCE_S", 0.2)
    proxy.fail(with_=Hang(), times=None)
    assert shared("mine", watched).find(make_action().key) is None
    assert told == [f"going on without the shared cache `{watched.url}`: it has not answered for 0 s"]


def test_a_cache_that_goes_down_while_a_result_is_fetched_is_done_without(
    watched: Place,
    proxy: Proxy,
    shared: Callable[..., SharingStore],
    put: Put,
    make_action: MakeAction,
    told: Told,
) -> None:
    put(into=shared("colleague", watched, push=True), action=make_action())
    told.clear()
    proxy.fail(
        match=lambda request: "/blobs/" in request.path, with_=Answer(status=403, code="AccessDenied"), times=None
    )
    store = shared("mine", watched)
    assert store.find(make_action().key) is None
    assert [line.partition(":")[0] for line in told] == ["going on without the shared cache `s3"]
    assert put(into=store, action=make_action()).id in store.results(make_action().key)


def test_a_place_that_is_no_store_is_an_error_and_not_done_without(
    place: Place, shared: Callable[..., SharingStore], make_action: MakeAction
) -> None:
    place.write("holiday.jpg", b"x")
    with pytest.raises(SettingsError, match=r"is no store: it holds `holiday.jpg`"):
        shared("mine", place).find(make_action().key)


# -- damage


@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_a_damaged_result_here_is_had_again_from_there(
    place: Place,
    shared: Callable[..., SharingStore],
    put: Put,
    make_action: MakeAction,
    told: Told,
    what: str,
) -> None:
    made = put(into=shared("mine", place, push=True), action=make_action())
    store = shared("mine", place)
    spoil_here(store, layout.blob(made.files[1].sha256) if what == "blob" else layout.manifest(made.hex))
    told.clear()
    assert store.find(make_action().key) == made
    assert told[-1].startswith(f"damaged here, and had again from `{place.url}`: ")
    assert Store(store.root, verify_full=True).verify(made.id) == []


def test_a_damaged_result_that_is_nowhere_else_is_an_error(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    store = shared("mine", place)
    made = put(into=store, action=make_action())
    spoil_here(store, layout.blob(made.files[1].sha256))
    with pytest.raises(CorruptError, match="has changed bytes"):
        store.find(make_action().key)


@pytest.mark.parametrize("what", ["blob", "manifest", "missing"])
def test_a_damaged_result_there_is_not_used_and_put_right_when_it_is_made_again(
    place: Place,
    shared: Callable[..., SharingStore],
    put: Put,
    make_action: MakeAction,
    told: Told,
    tmp_path: Path,
    what: str,
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action())
    blob = layout.blob(made.files[1].sha256)
    if what == "missing":
        place.delete(blob)
    else:
        spoil(place, blob if what == "blob" else layout.manifest(made.hex))
    told.clear()
    store = shared("mine", place, push=True)
    assert store.find(make_action().key) is None
    assert any(line.startswith(f"not used from `{place.url}`: ") for line in told)
    assert put(into=store, action=make_action()) == made
    fresh = Store(tmp_path / "fresh")
    transfer.pull(fresh, made.id, Remote.open(place.url))
    assert fresh.verify(made.id) == []


def test_of_several_results_there_a_whole_one_is_used(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    colleague = shared("colleague", place, push=True)
    whole = put({"a": b"1"}, into=colleague, action=make_action())
    damaged = put({"a": b"2"}, into=colleague, action=make_action())
    spoil(place, layout.blob(damaged.files[0].sha256))
    assert shared("mine", place).find(make_action().key) == whole


def test_a_result_of_another_action_is_not_taken_for_this_one(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action())
    other = make_action(op_version=2).key
    place.write(layout.action(other, made.hex), place.read(layout.action(make_action().key, made.hex)))
    assert shared("mine", place).find(other) is None


# -- signatures


@pytest.mark.parametrize(
    ("attestation", "said"),
    [(None, "it is not signed"), (signed_by(THEIRS), "no signature by")],
    ids=["unsigned", "by another"],
)
def test_what_nobody_trusted_has_signed_is_not_used_and_told(
    place: Place,
    shared: Callable[..., SharingStore],
    put: Put,
    make_action: MakeAction,
    told: Told,
    attestation: Any,
    said: str,
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action(), attestation=attestation)
    told.clear()
    store = shared("ci", place, trust=[OURS.public])
    assert store.find(make_action().key) is None
    [line] = told
    assert line.startswith(f"not used from `{place.url}`: the artifact `{made.id}` has no valid signature by `key-1`: ")
    assert not store.has(made.id)
    with pytest.raises(CorruptError, match="no valid signature"):
        store.path(made.id)
    with pytest.raises(CorruptError, match="no valid signature"):
        store.export(made.id, store.root.parent / "copy")


def test_what_was_made_here_needs_no_signature(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action())
    store = shared("ci", place, trust=[OURS.public])
    assert store.find(make_action().key) is None
    assert put(into=store, action=make_action()) == made
    assert store.find(make_action().key) == made
    assert store.path(made.id).is_dir()


def test_what_a_trusted_key_has_signed_is_used_with_its_signature(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    made = put(into=shared("colleague", place, push=True), action=make_action(), attestation=signed_by(OURS))
    store = shared("ci", place, trust=[THEIRS.public, OURS.public])
    assert store.find(make_action().key) == made
    assert len(store.envelopes(made.id)) == 1


def test_what_came_unsigned_before_is_not_used_once_it_must_be_signed(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction, told: Told
) -> None:
    colleague = shared("colleague", place, push=True)
    made = put(into=colleague, action=make_action())
    assert shared("ci", place).find(make_action().key) == made
    told.clear()
    store = shared("ci", place, trust=[OURS.public])
    assert store.find(make_action().key) is None
    assert told[0].startswith("not used, though it is on this disk: ")
    with pytest.raises(CorruptError, match="no valid signature"):
        store.path(made.id)
    colleague.attach(made.id, signed_by(OURS)(made))
    assert shared("ci", place, trust=[OURS.public]).find(make_action().key) == made


def test_a_statement_that_is_signed_later_goes_there_too(
    place: Place, shared: Callable[..., SharingStore], put: Put, make_action: MakeAction
) -> None:
    store = shared("mine", place, push=True)
    made = put(into=store, action=make_action())
    store.attach(made.id, signed_by(OURS)(made))
    assert Remote.open(place.url).statements(made.id) == store.envelopes(made.id) != []


# -- a store on S3, and this disk its cache


def test_a_store_on_s3_is_the_same_on_every_machine(
    owned: Callable[..., S3Store], put: Put, make_action: MakeAction, s3_place: Place
) -> None:
    first, second = owned("1"), owned("2")
    made = put(into=first, action=make_action(), attestation=signed_by(OURS), metrics={"kl_mean": 0.5})
    first.set_name("best", made.id)
    assert second.url == s3_place.url
    assert second.find(make_action().key) == made
    assert second.ids() == [made.id]
    assert [manifest for manifest, _ in second.ls()] == [made]
    assert second.names() == {"best": made.id}
    assert second.resolve("best") == second.resolve(made.hex[:8]) == made.id
    assert second.results(make_action().key) == [made.id]
    assert [action.key for action in owned("3").actions("quantize.gptq")] == [make_action().key]
    assert owned("4").statements(made.id) == first.statements(made.id) != []
    assert owned("5").read(made, "tokenizer/vocab.txt") == b"a\nb\n"
    assert owned("6").verify(made.id) == []
    owned("7").export(made.id, second.root / "copy")
    assert sorted(path.name for path in (second.root / "copy").iterdir()) == [
        "config.json", "llmopt.json", "model.safetensors", "tokenizer"
    ]  # fmt: skip


def test_a_name_is_moved_on_every_machine_and_what_it_stood_for_is_told(
    owned: Callable[..., S3Store], put: Put, told: Told
) -> None:
    first, second = owned("1"), owned("2")
    one, two = put({"a": b"1"}, into=first), put({"a": b"2"}, into=first)
    first.set_name("best", one.id)
    second.set_name("best", two.id)
    assert first.resolve("best") == two.id
    assert f"the name `best` stood for {one.id[:19]} until now" in told


def test_two_machines_that_make_the_same_at_once_have_one_artifact(
    owned: Callable[..., S3Store], put: Put, make_action: MakeAction
) -> None:
    made = [put(into=owned(machine), action=make_action()) for machine in "12"]
    assert made[0] == made[1]
    assert owned("3").ids() == [made[0].id]


def test_different_results_of_machines_are_both_told(
    owned: Callable[..., S3Store], put: Put, make_action: MakeAction
) -> None:
    made = [put({"a": text}, into=owned(str(text)), action=make_action()).id for text in (b"1", b"2")]
    assert sorted(owned("3").results(make_action().key)) == sorted(made)


def test_a_store_on_s3_that_is_down_is_an_error(
    watched: Place, proxy: Proxy, put: Put, make_action: MakeAction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "machine")
    store = open_store(watched.url)
    proxy.fail(with_=Answer(status=403, code="AccessDenied"), times=None)
    for ask in (lambda: store.find(make_action().key), store.ls, store.names, lambda: put(into=store)):
        with pytest.raises(LlmoptError, match="does not allow"):
            ask()


def test_what_could_not_be_sent_is_sent_by_the_next_try(
    watched: Place, proxy: Proxy, put: Put, make_action: MakeAction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "machine")
    proxy.fail(with_=Answer(status=403, code="AccessDenied"), times=None)
    with pytest.raises(LlmoptError):
        put(into=open_store(watched.url), action=make_action())
    proxy.heal()
    store = open_store(watched.url)
    found = store.find(make_action().key)
    assert found is not None
    assert store.ids() == [found.id]


def test_a_hit_on_this_disk_fetches_no_file(
    watched: Place, proxy: Proxy, put: Put, make_action: MakeAction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.artifacts.remote.shared.cache_home", lambda: tmp_path / "machine")
    made = put(into=open_store(watched.url), action=make_action())
    proxy.forget()
    store = open_store(watched.url)
    assert store.find(make_action().key) == made
    store.path(made.id)
    assert proxy.count(*WRITES) == 0
    assert not [path for _, path, _, _ in proxy.log() if "/blobs/" in path]
    assert proxy.count() <= 2


def test_the_cache_keeps_within_its_limit_and_what_left_it_is_fetched_again(
    owned: Callable[..., S3Store], put: Put, told: Told
) -> None:
    writer = owned("1", cache_bytes=2500)
    made = [put({"a": bytes([number]) * 1000}, into=writer) for number in range(4)]
    assert [writer.has(each.id) for each in made] == [False, False, True, True]
    assert any("the cache was full" in line for line in told)
    assert sorted(writer.ids()) == sorted(each.id for each in made)
    again = owned("1", cache_bytes=2500)
    assert (again.path(made[0].id) / "a").read_bytes() == b"\0" * 1000
    assert sum(again.has(each.id) for each in made) == 2


def test_each_server_has_a_cache_of_its_own(
    rclone: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    through = open_store("s3://bucket/store").root
    assert open_store("s3://bucket/store/").root == through
    rclone.set_in(monkeypatch)
    assert open_store("s3://bucket/store").root != through
    assert through.is_relative_to(tmp_path / "llmopt" / "stores")


def test_a_remote_beside_a_store_on_s3_is_refused(rclone: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    rclone.set_in(monkeypatch)
    with pytest.raises(SettingsError, match="`--remote s3://b/two` goes with a store on this disk"):
        open_store("s3://bucket/one", remote="s3://b/two")


def test_a_killed_machine_leaves_nothing_half_made_and_its_work_is_sent_by_the_next_command(
    watched: Place, proxy: Proxy, tmp_path: Path, make_action: MakeAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of its sending."""
    proxy.fail(
        match=lambda request: request.method == "PUT" and "/manifests/" in request.path,
        with_=Answer(status=403, code="AccessDenied"),
    )
    code = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from llmopt.artifacts import Action\n"
        "from llmopt.artifacts.remote.shared import open_store\n"
        "from llmopt.errors import LlmoptError\n"
        "store = open_store(sys.argv[1])\n"
        "with store.stage() as folder:\n"
        "    (folder / 'a').write_bytes(b'1' * 1000)\n"
        f"    action = Action(**{vars_of(make_action())!r})\n"
        "    try:\n"
        "        store.put(folder, kind='model', action=action)\n"
        "    except LlmoptError:\n"
        "        os._exit(9)\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    assert subprocess.run([sys.executable, "-c", code, watched.url], timeout=60, check=False).returncode == 9
    assert not watched.keys("manifests/")
    assert not watched.keys("actions/")
    store = open_store(watched.url)
    found = store.find(make_action().key)
    assert found is not None
    assert watched.keys("manifests/") == [layout.manifest(found.hex)]
    data = watched.read(layout.manifest(found.hex))
    assert hashlib.sha256(data).hexdigest() == found.hex


def vars_of(action: Action) -> dict[str, Any]:
    fields = json.loads(json.dumps({key: value for key, value in vars(action).items() if key != "key"}))
    assert isinstance(fields, dict)
    return fields
