"""What an S3 server can be relied on for, found by trying: they differ, and few say so.

The store is correct when every answer is no; each yes saves a request or tells a writer that another was first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.artifacts.outcome import Json
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.objects.s3 import S3Objects

_FOLDER = "leases"  # of the probe's own objects, where nothing lasts
_AGE_S = 7 * 24 * 3600
_WRITERS, _ROUNDS = 8, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Abilities:
    """What names can rely on. `swaps`: a PUT with If-None-Match or with If-Match for another version is refused, and of
    several writers at once exactly one wins. `quoted_tags`: If-Match has the tag as it came, in quotes, which is the
    rule; Ceph knows it only without."""

    swaps: bool
    quoted_tags: bool

    @classmethod
    def known(cls, objects: S3Objects) -> Abilities:
        """As found here in the last week, or else now: in some seventy requests where it swaps, three where not."""
        found = _remembered(objects)
        if found is None:
            found = _names(objects)
            remember(objects, found)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Each answer of `llmopt store probe`. Numbers are of rounds in which it was so."""

    endpoint: str
    create: bool  # PUT If-None-Match: * is refused over an object
    create_rounds: int
    create_one_winner: int  # rounds in which exactly one of the writers won
    swap: bool  # PUT If-Match of another version is refused, and of the right one taken
    swap_quoted: bool  # with the tag in quotes, as it came
    swap_one_winner: int
    complete_create: bool  # CompleteMultipartUpload If-None-Match: * is refused over an object
    wrong_sha256_refused: bool  # a part whose bytes are not those it was signed with
    listed_at_once: bool  # what was just written is in a listing
    ranges: bool  # GET of a range gives that range
    round_trip_ms: float

    @property
    def relied_on(self) -> Abilities:
        atomic = self.create_one_winner == self.swap_one_winner == self.create_rounds
        return Abilities(swaps=self.create and self.swap and atomic, quoted_tags=self.swap_quoted)

    def to_json(self) -> dict[str, Json]:
        return {**asdict(self), "relied_on": asdict(self.relied_on)}


def remember(objects: S3Objects, found: Abilities) -> None:
    file = _file(objects)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(found)))
        fresh.replace(file)


def _remembered(objects: S3Objects) -> Abilities | None:
    file = _file(objects)
    with suppress(OSError, ValueError, TypeError, KeyError):
        if time.time() - file.stat().st_mtime < _AGE_S:
            found = json.loads(file.read_text())
            if isinstance(found["swaps"], bool) and isinstance(found["quoted_tags"], bool):
                return Abilities(swaps=found["swaps"], quoted_tags=found["quoted_tags"])
    return None


def _names(objects: S3Objects) -> Abilities:
    """Whether names can be moved by compare and swap."""
    if not _creates(objects, 0, 0)[0]:
        return Abilities(swaps=False, quoted_tags=True)
    swaps, quoted, won = _swaps(objects, _WRITERS, _ROUNDS)
    atomic = swaps and won == _ROUNDS and _creates(objects, _WRITERS, _ROUNDS)[1] == _ROUNDS
    return Abilities(swaps=atomic, quoted_tags=quoted)


def probe(objects: S3Objects, *, writers: int = 16, rounds: int = 20) -> Probe:
    """Ask for all of it, with objects that are removed again. LlmoptError where the bucket cannot be used at all."""
    begin = time.monotonic()
    key = _key()
    objects.write(key, b"0123456789")
    round_trip_ms = (time.monotonic() - begin) * 1000
    listed = any(found.key == key for found in objects.list(f"{_FOLDER}/"))
    ranges = bytes(objects.read_range(key, 2, 5)) == b"234"
    objects.delete([key])
    create, one = _creates(objects, writers, rounds)
    swap, quoted, one_swap = _swaps(objects, writers, rounds)
    complete, refused = _multipart(objects)
    found = Probe(
        endpoint=objects.access.endpoint,
        create=create,
        create_rounds=rounds,
        create_one_winner=one,
        swap=swap,
        swap_quoted=quoted,
        swap_one_winner=one_swap,
        complete_create=complete,
        wrong_sha256_refused=refused,
        listed_at_once=listed,
        ranges=ranges,
        round_trip_ms=round(round_trip_ms, 1),
    )
    remember(objects, found.relied_on)
    return found


def _creates(objects: S3Objects, writers: int, rounds: int) -> tuple[bool, int]:
    """Whether creating over an object is refused, and in how many rounds exactly one writer created it."""
    key = _key()
    objects.write(key, b"first")
    refused = not objects.conditional(key, b"second", "create")
    objects.delete([key])
    return refused, sum(_race(objects, writers, lambda _: "create", None) for _ in range(rounds))


def _swaps(objects: S3Objects, writers: int, rounds: int) -> tuple[bool, bool, int]:
    """Whether a swap of another version is refused and one of the right version is not, with the tag in quotes or
    bare, and in how many rounds exactly one writer won."""
    for quoted in (True, False):
        key = _key()
        objects.write(key, b"first")
        old = _mode(_tag(objects, key), quoted)
        objects.write(key, b"second")
        new = _mode(_tag(objects, key), quoted)
        try:
            right = not objects.conditional(key, b"third", old) and objects.conditional(key, b"third", new)
        except LlmoptError:  # not implemented
            right = False
        objects.delete([key])
        if right:
            mode = partial(_mode, quoted=quoted)
            return True, quoted, sum(_race(objects, writers, mode, b"first") for _ in range(rounds))
    return False, True, 0


def _mode(tag: str | None, quoted: bool) -> dict[str, str]:
    tag = tag or ""
    return {"e_tag": tag if quoted else tag.strip('"')}


def _race(objects: S3Objects, writers: int, mode: Callable[[str | None], Any], before: bytes | None) -> bool:
    """Whether exactly one of some writers at once wins, and the object is then that one's."""
    key = _key()
    tag = None
    if before is not None:
        objects.write(key, before)
        tag = _tag(objects, key)

    def write(number: int) -> bool:
        try:
            return objects.conditional(key, f"{number} of {writers}".encode(), mode(tag))
        except LlmoptError:
            return False

    with ThreadPoolExecutor(max(1, writers)) as threads:
        won = [number for number, so in enumerate(threads.map(write, range(writers))) if so]
    left = objects.read(key, most=100)
    objects.delete([key])
    return len(won) == 1 and left == f"{won[0]} of {writers}".encode()


def _multipart(objects: S3Objects) -> tuple[bool, bool]:
    """Whether completing over an object can be refused, and whether a part is compared with its sha256."""
    from llmopt.artifacts.objects.multipart import conditional_completion, wrong_digest

    try:
        return conditional_completion(objects, _key()), wrong_digest(objects, _key())
    except LlmoptError:
        return False, False


def _tag(objects: S3Objects, key: str) -> str | None:
    found = objects.read_tagged(key, most=100)
    return None if found is None else found[1]


def _key() -> str:
    return f"{_FOLDER}/probe-{os.urandom(8).hex()}"


def _file(objects: S3Objects) -> Path:
    from llmopt.artifacts.disk import cache_home

    name = hashlib.sha256(f"{objects.access.endpoint}\n{objects.bucket}".encode()).hexdigest()[:24]
    return cache_home() / "s3" / f"{name}.json"
