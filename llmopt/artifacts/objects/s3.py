"""Objects in a bucket of any S3 server, by obstore; large ones in parts that survive a cut, and listings, by
`multipart.py`.

Nothing here trusts an ETag: who reads compares digests. Source: Amazon S3 API reference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from llmopt import backends
from llmopt.artifacts.disk import PIECE_BYTES
from llmopt.artifacts.objects import PART_BYTES, Found, GoneError, errors, multipart
from llmopt.artifacts.objects.credentials import Access
from llmopt.artifacts.objects.errors import RefusedError
from llmopt.artifacts.objects.multipart import Upload, Wire
from llmopt.artifacts.objects.retries import again
from llmopt.artifacts.threads import apart
from llmopt.errors import LlmoptError, SettingsError

if TYPE_CHECKING:
    from llmopt.artifacts.objects.abilities import Abilities

T = TypeVar("T")

_URL = re.compile(r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/(.*))?")


class S3Objects:
    """See `Objects`."""

    remote = True

    def __init__(self, access: Access, bucket: str, prefix: str) -> None:
        self.access, self.bucket, self.prefix = access, bucket, prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        obstore: Any = backends.load("obstore", extra="s3")
        store: Any = backends.load("obstore.store", extra="s3")
        self._errors: Any = backends.load("obstore.exceptions", extra="s3")
        self._obstore = obstore
        self._odd_ranges = False
        self.met = False  # whether the server has ever answered
        self._store = store.S3Store(
            bucket,
            prefix=prefix or None,
            config={"aws_endpoint_url_s3": access.endpoint},  # which counts before what obstore finds by itself
            region=access.region,
            virtual_hosted_style_request=False,
            credential_provider=access.for_obstore,
            client_options={
                "allow_http": access.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=multipart.CONNECT_S),
                "read_timeout": timedelta(seconds=multipart.SILENCE_S),
                "timeout": timedelta(hours=1),  # a slow line is no error; silence is
                "pool_idle_timeout": timedelta(seconds=20),
            },
            retry_config={"max_retries": 0},  # it would not try conditional writes again; `retries.py` does
        )

    @classmethod
    def open(cls, url: str) -> S3Objects:
        """Of `s3://bucket/prefix`, as the AWS environment and files say. Nothing is asked yet."""
        found = _URL.fullmatch(url.rstrip("/"))
        if found is None or any(part in ("", ".", "..") for part in (found[2] or "x").split("/")):
            raise SettingsError(f"`{url}` is not `s3://BUCKET/PREFIX`", hint="3 to 63 lower-case letters, digits, `-`")
        backends.require("obstore", extra="s3")
        return cls(Access.find(), found[1], found[2] or "")

    # -- see `Objects`

    def read(self, key: str, *, most: int) -> bytes | None:
        found = self.read_tagged(key, most=most)
        return None if found is None else found[0]

    def read_tagged(self, key: str, *, most: int) -> tuple[bytes, str | None] | None:
        def get() -> tuple[bytes | None, str | None]:
            result = self._obstore.get(self._store, key)
            meta = result.meta
            return (bytes(result.bytes()) if meta["size"] <= most else None), meta["e_tag"]

        found = self._try("reading", get, gone=None)
        if found is None:
            return None
        data, tag = found
        return bytes(self.read_range(key, 0, most + 1)) if data is None else data, tag

    def read_range(self, key: str, begin: int, end: int) -> memoryview:
        pieces = list(self.stream(key, begin, end, piece_bytes=end - begin))
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def stream(self, key: str, begin: int, end: int, *, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
        """After a cut it goes on where it was."""
        coming: Iterator[Any] | None = None

        def piece() -> Any:
            nonlocal coming
            try:
                if coming is None:
                    found = self._obstore.get(self._store, key, options={"range": (begin, end)})
                    coming = iter(found.stream(min_chunk_size=piece_bytes))
                return next(coming, None)
            except BaseException:
                coming = None
                raise

        while begin < end:
            if self._odd_ranges:
                yield memoryview(Wire.of(self).read_range(key, begin, end))
                return
            try:
                data = self._tried(piece)
            except (self._errors.NotFoundError, FileNotFoundError) as error:
                raise self._gone(error, key) from None
            except self._errors.BaseError as error:
                if errors.status_of(str(error)) == 416 or errors.code_of(str(error)) == "InvalidRange":
                    return  # it is shorter than that
                if "non-partial response" not in str(error):
                    raise self._tell(error, "reading") from None
                self._odd_ranges = True  # rclone gives the range, and says that it is the whole
                continue
            if data is None:
                return
            begin += len(data)
            yield memoryview(data)

    def find(self, key: str) -> Found | None:
        meta = self._try("reading", lambda: self._obstore.head(self._store, key), gone=None)
        return None if meta is None else _found(meta)

    def write(self, key: str, data: bytes | memoryview) -> None:
        self._try("writing", lambda: self._obstore.put(self._store, key, data, use_multipart=False))

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        if not self.swaps:
            self.write(key, data)
            return True
        if tag is not None and not self.abilities.quoted_tags:
            tag = tag.strip('"')
        return self.conditional(key, data, "create" if tag is None else {"e_tag": tag})

    @property
    def swaps(self) -> bool:
        """Whether one of several writers at the same time wins, and the others learn of it."""
        return self.abilities.swaps

    def sender(self, key: str, size: int, digest: str) -> Upload:
        return Upload.begin(self, key, size, digest)

    def list(self, prefix: str = "") -> Iterator[Found]:
        yield from Wire.of(self).list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            batch = list(keys[start : start + 1000])
            try:
                self._try("deleting", lambda batch=batch: self._obstore.delete(self._store, batch))  # type: ignore[misc]
            except RefusedError:  # not every server deletes many at once
                for key in batch:
                    self._try("deleting", lambda key=key: self._obstore.delete(self._store, key), gone=None)  # type: ignore[misc]

    def now(self) -> float:
        key = f"leases/clock-{os.urandom(6).hex()}"
        self.write(key, b"")
        found = self.find(key)
        self.delete([key])
        if found is None:
            raise LlmoptError(f"what was written to `{self.url}` is not there", hint="is something deleting in it?")
        return found.modified_s

    # -- within

    @cached_property
    def abilities(self) -> Abilities:
        from llmopt.artifacts.objects.abilities import Abilities

        return Abilities.known(self)

    def conditional(self, key: str, data: bytes | memoryview, mode: Any) -> bool:
        """With obstore's `mode`; false where the condition does not hold, also where a first, lost try has met it."""
        try:
            self._tried(lambda: self._obstore.put(self._store, key, data, mode=mode, use_multipart=False))
        except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
            return False
        except (self._errors.NotFoundError, FileNotFoundError) as error:
            if errors.code_of(str(error)) == "NoSuchKey":  # there is nothing to swap any more
                return False
            raise self._tell(error, "writing") from None
        except self._errors.BaseError as error:
            if errors.code_of(str(error)) == "ConditionalRequestConflict":  # another one is being written now
                return False
            raise self._tell(error, "writing") from None
        return True

    def _try(self, what: str, work: Callable[[], T], **default: T) -> T:
        """`gone` is the answer where there is no such object."""
        try:
            return self._tried(work)
        except (self._errors.NotFoundError, FileNotFoundError) as error:
            if "gone" in default and errors.code_of(str(error)) != "NoSuchBucket":
                return default["gone"]
            raise self._tell(error, what) from None
        except self._errors.BaseError as error:
            raise self._tell(error, what) from None

    def _tried(self, work: Callable[[], T]) -> T:
        """What obstore gives or raises in the end."""

        def once() -> T:
            try:
                found = work()
            except Exception as error:
                self.met |= errors.status_of(str(error)) is not None
                raise
            self.met = True
            return found

        return apart(lambda: again(once, passing=lambda error: errors.is_passing(str(error)), met=lambda: self.met))

    def _gone(self, error: Exception, key: str) -> LlmoptError:
        if errors.code_of(str(error)) == "NoSuchBucket":
            return self._tell(error, "reading")
        return GoneError(f"`{self.url}/{key}` is missing", hint="`llmopt store verify` tells what else is")

    def _tell(self, error: Exception, what: str) -> LlmoptError:
        return self.tell(str(error), what)

    def tell(self, text: str, what: str) -> LlmoptError:
        return errors.tell(text, bucket=self.bucket, endpoint=self.access.endpoint, what=what)


def _found(meta: Any) -> Found:
    return Found(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta["e_tag"])


assert PART_BYTES >= 5 << 20, "S3's least size of a part"
