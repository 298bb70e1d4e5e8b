"""What servers can be relied on for is found out as it is, asked for once, and only when it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import Answer, Proxy, Server

from llmopt.artifacts import Manifest, Store
from llmopt.artifacts.objects.abilities import Abilities, Probe, probe
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.artifacts.remote import Remote, transfer

#: As tests/servers says of each.
KNOWN = {
    "rclone": {"create": False, "swap": False, "complete_create": False, "wrong_sha256_refused": False},
    "ceph": {
        "create": True,
        "swap": True,
        "complete_create": False,
        "wrong_sha256_refused": True,
        "swap_quoted": False,
    },
    "swift": {"create": True, "swap": False, "complete_create": True, "wrong_sha256_refused": True},
}
RELIED_ON = {
    "rclone": Abilities(swaps=False, quoted_tags=True),
    "ceph": Abilities(swaps=True, quoted_tags=False),
    "swift": Abilities(swaps=False, quoted_tags=True),
}


@pytest.fixture
def found(s3: S3Objects) -> Probe:
    return probe(s3, writers=8, rounds=3)


def left(s3: S3Objects) -> list[str]:
    """rclone may go on listing what was written twice and then deleted, though it is gone."""
    return [found.key for found in s3.list() if s3.find(found.key) is not None]


def test_finds_what_is_known_of_each(found: Probe, s3_server: Server) -> None:
    answers = found.to_json()
    known = KNOWN[s3_server.name]
    assert {name: answers[name] for name in known} == known
    assert (found.listed_at_once, found.ranges) == (True, True)
    if s3_server.name == "ceph":
        assert (found.create_one_winner, found.swap_one_winner) == (3, 3)
    assert found.relied_on == RELIED_ON[s3_server.name]


def test_leaves_nothing(found: Probe, s3: S3Objects) -> None:
    assert left(s3) == []


def test_what_is_found_out_when_needed_is_the_same(s3: S3Objects, s3_server: Server) -> None:
    assert Abilities.known(s3) == RELIED_ON[s3_server.name]
    assert left(s3) == []


def test_is_asked_once(s3: S3Objects, proxy: Proxy) -> None:
    abilities = s3.abilities
    proxy.forget()
    assert S3Objects.open(s3.url).abilities == abilities
    assert proxy.count() == 0


def test_another_bucket_is_asked_anew(s3: S3Objects, s3_server: Server, proxy: Proxy) -> None:
    _ = s3.abilities
    proxy.forget()
    _ = S3Objects.open(f"s3://{s3_server.new_bucket()}/store").abilities
    assert proxy.count() > 0


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"swaps": "yes", "quoted_tags": true}'])
def test_a_damaged_record_is_as_none(content: str, s3: S3Objects, tmp_path: Path) -> None:
    abilities = s3.abilities
    [file] = (tmp_path / "cache" / "llmopt" / "s3").iterdir()
    file.write_text(content)
    assert S3Objects.open(s3.url).abilities == abilities


def test_no_names_on_a_server_that_cannot_compare_cost_little(s3: S3Objects, s3_server: Server, proxy: Proxy) -> None:
    if KNOWN[s3_server.name]["create"]:
        pytest.skip("it can")
    _ = s3.swaps
    assert proxy.count() == 3


def test_names_are_right_where_every_answer_is_no(
    s3: S3Objects, small: tuple[Store, Manifest], large: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    no = Abilities(swaps=False, quoted_tags=True)
    monkeypatch.setitem(vars(s3), "abilities", no)
    remote = Remote(s3)
    for store, manifest in (small, large):
        transfer.push(store, manifest.id, remote)
    assert remote.set_name("best", small[1].id) is None
    assert remote.set_name("best", large[1].id) == small[1].id
    assert remote.names() == {"best": large[1].id}


def test_a_bucket_that_cannot_be_used_is_an_error(s3: S3Objects, proxy: Proxy) -> None:
    from llmopt.errors import LlmoptError

    proxy.fail(with_=Answer(status=403, code="AccessDenied"), times=None)
    with pytest.raises(LlmoptError, match="does not allow writing"):
        probe(s3)
