"""Uploads in parts that go on after a cut: what the server has of them is asked, not remembered.

obstore uploads in parts too, but begins anew after a crash. So these few requests are made here, signed by botocore;
each part is signed with its own sha256, which the server checks. Source: Amazon S3 API reference,
CreateMultipartUpload, UploadPart, ListParts, CompleteMultipartUpload, ListMultipartUploads.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree

from llmopt import backends
from llmopt.artifacts.objects import GoneError, errors, parts_of
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.objects.s3 import S3Objects

_TRIES = 6
_CONNECT_S, _SILENCE_S = 10.0, 60.0
_CONNECTIONS = 16
_MOST_BYTES = 8 << 20  # of an answer


class Upload:
    """See `Sender`. Its id is found again by asking which uploads of the key are open."""

    def __init__(self, wire: Wire, key: str, size: int, upload_id: str, there: Mapping[int, tuple[int, str]]) -> None:
        self._wire, self._key, self._size, self._id = wire, key, size, upload_id
        spans = parts_of(size)
        self._tags = {n: there[n][1] for n, begin, end in spans if n in there and there[n][0] == end - begin}
        self.parts: Sequence[tuple[int, int, int]] = [span for span in spans if span[0] not in self._tags]
        self.resumed = len(self._tags)

    @classmethod
    def begin(cls, objects: S3Objects, key: str, size: int, digest: str) -> Upload:
        """A new one, or where the key is the digest of the bytes, so that parts fit, the last that was begun for it."""
        wire = Wire.of(objects)
        for upload_id in wire.open_uploads(key) if key.endswith(f"/{digest}") else ():
            there = wire.parts(key, upload_id)
            if there is not None:
                return cls(wire, key, size, upload_id, there)
        root = wire.xml("POST", key, {"uploads": ""}, what="writing")
        begun = _text(root, "UploadId")
        if begun is None:
            raise LlmoptError(f"`{objects.access.endpoint}` began no upload", hint="is it an S3 server?")
        return cls(wire, key, size, begun, {})

    def send(self, number: int, data: bytes | memoryview) -> None:
        query = {"partNumber": str(number), "uploadId": self._id}
        _, headers, _ = self._wire.request("PUT", self._key, query, data, what="writing")
        self._tags[number] = headers.get("etag", "")

    def finish(self, headers: Mapping[str, str] | None = None) -> None:
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{_escaped(tag)}</ETag></Part>"
            for number, tag in sorted(self._tags.items())
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        try:
            root = self._wire.xml("POST", self._key, {"uploadId": self._id}, body, what="writing", headers=headers)
            if root.tag.rpartition("}")[2] == "Error":  # S3 may answer 200 and then fail
                raise self._wire.objects.tell(ElementTree.tostring(root).decode(), "writing")
        except LlmoptError:
            # An answer that was lost: tried again, it says that there is no such upload.
            found = self._wire.objects.find(self._key)
            if headers is not None or found is None or found.size != self._size:
                raise

    def give_up(self) -> None:
        """The parts stay, for the next try; `abort_old` removes what nobody came back to."""


def abort_old(objects: S3Objects, prefix: str, before_s: float, *, keep: Collection[str] = ()) -> int:
    """Remove the parts of uploads below `prefix` that were begun before this time (seconds since 1970); how many.

    `keep` are the keys of those that somebody may have gone on with.
    """
    from datetime import datetime

    wire, count = Wire.of(objects), 0
    for upload in wire.uploads(prefix):
        begun = _text(upload, "Initiated")
        key, upload_id = _text(upload, "Key"), _text(upload, "UploadId")
        if begun is None or key is None or upload_id is None or wire.below(key) in keep:
            continue
        if datetime.fromisoformat(begun.replace("Z", "+00:00")).timestamp() < before_s:
            wire.request("DELETE", wire.below(key), {"uploadId": upload_id}, what="deleting")
            count += 1
    return count


def conditional_completion(objects: S3Objects, key: str) -> bool:
    """Whether completing an upload can be refused where there is an object already."""
    wire = Wire.of(objects)
    objects.write(key, b"first")
    upload = Upload.begin(objects, key, 6, "")
    upload.send(1, b"second")
    try:
        upload.finish({"If-None-Match": "*"})
        return objects.read(key, most=100) == b"first"
    except LlmoptError:
        return True
    finally:
        for upload_id in list(wire.open_uploads(key)):
            wire.request("DELETE", key, {"uploadId": upload_id}, what="deleting")
        objects.delete([key])


def wrong_digest(objects: S3Objects, key: str) -> bool:
    """Whether bytes that are not those that the request was signed with are refused."""
    wire = Wire.of(objects)
    try:
        wire.request("PUT", key, {}, b"other bytes", what="writing", digest=hashlib.sha256(b"bytes").hexdigest())
        return False
    except LlmoptError:
        return True
    finally:
        objects.delete([key])


class Wire:
    """Signed requests on kept connections."""

    def __init__(self, objects: S3Objects) -> None:
        self.objects = objects
        urllib3: Any = backends.load("urllib3", extra="s3")
        self._errors: Any = backends.load("urllib3.exceptions", extra="s3")
        self._pool = urllib3.PoolManager(
            maxsize=_CONNECTIONS,
            retries=False,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=_SILENCE_S),
            cert_reqs="CERT_REQUIRED",
        )

    @classmethod
    def of(cls, objects: S3Objects) -> Wire:
        """One for each `S3Objects`."""
        found = vars(objects).setdefault("_wire", None) or cls(objects)
        vars(objects)["_wire"] = found
        assert isinstance(found, cls)
        return found

    def below(self, key: str) -> str:
        """The key of an object within the prefix, of one in the bucket."""
        return key.removeprefix(f"{self.objects.prefix}/") if self.objects.prefix else key

    def open_uploads(self, key: str) -> Iterator[str]:
        """The ids of the uploads of this very key, the newest first."""
        found = [
            (_text(upload, "Initiated") or "", identity)
            for upload in self.uploads(key)
            if self.below(_text(upload, "Key") or "") == key and (identity := _text(upload, "UploadId"))
        ]
        yield from (identity for _, identity in sorted(found, reverse=True))

    def uploads(self, prefix: str) -> Iterator[ElementTree.Element]:
        whole = f"{self.objects.prefix}/{prefix}" if self.objects.prefix else prefix
        query = {"uploads": "", "prefix": whole}
        while True:
            try:
                root = self.xml("GET", None, query, what="listing")
            except LlmoptError:  # not every server can list them
                return
            yield from (child for child in root if child.tag.rpartition("}")[2] == "Upload")
            if _text(root, "IsTruncated") != "true":
                return
            query["key-marker"] = _text(root, "NextKeyMarker") or ""
            query["upload-id-marker"] = _text(root, "NextUploadIdMarker") or ""

    def read_range(self, key: str, begin: int, end: int) -> bytes:
        """By `Range`, whatever the status of the answer says of it."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        _, answered, data = self.request("GET", key, {}, what="reading", headers=headers)
        if "content-range" not in answered:
            data = data[begin:end]
        return data

    def parts(self, key: str, upload_id: str) -> dict[int, tuple[int, str]] | None:
        """Size and tag of each part that the server has; None when it does not know the upload."""
        found: dict[int, tuple[int, str]] = {}
        query = {"uploadId": upload_id}
        while True:
            try:
                root = self.xml("GET", key, query, what="listing")
            except LlmoptError:
                return None
            for part in (child for child in root if child.tag.rpartition("}")[2] == "Part"):
                number, size, tag = (_text(part, name) for name in ("PartNumber", "Size", "ETag"))
                if number and size and tag:
                    found[int(number)] = (int(size), tag)
            marker = _text(root, "NextPartNumberMarker")
            if _text(root, "IsTruncated") != "true" or not marker:
                return found
            query["part-number-marker"] = marker

    def xml(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str],
        body: bytes = b"",
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
    ) -> ElementTree.Element:
        status, _, data = self.request(method, key, query, body, what=what, headers=headers)
        try:
            return ElementTree.fromstring(data)
        except ElementTree.ParseError:
            raise LlmoptError(
                f"`{self.objects.access.endpoint}` answered {status} with no XML", hint="is it an S3 server?"
            ) from None

    def request(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str],
        body: bytes | memoryview = b"",
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        digest: str | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The answer of a request, tried again while the server is busy or the connection breaks.

        It is signed with the `digest` of the body, by default the true one.
        """
        url, said = self._url(key, query), ""
        digest = digest or hashlib.sha256(body).hexdigest()
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(min(10.0, 0.1 * 2**attempt) * (0.5 + random.random() / 2))
            try:
                answer = self._pool.request(
                    method, url, body=body, headers=self._signed(method, url, digest, headers or {}), redirect=False
                )
            except self._errors.HTTPError as error:
                said = str(error)
                continue
            if answer.status < 300:
                return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.data
            said = f"status: {answer.status} {answer.data[:_MOST_BYTES].decode(errors='replace')}"
            if answer.status == 416:  # a range past the end
                return answer.status, {"content-range": ""}, b""
            if answer.status == 404 and errors.code_of(said) == "NoSuchKey":
                raise GoneError(f"`{self.objects.url}/{key}` is missing")
            busy = answer.status in (429, 500, 502, 503, 504)
            if not busy and errors.code_of(said) not in ("RequestTimeout", "SlowDown", "OperationAborted"):
                break
        raise self.objects.tell(said, what)

    def _url(self, key: str | None, query: Mapping[str, str]) -> str:
        path = self.objects.bucket
        if key is not None:
            path += f"/{self.objects.prefix}/{key}" if self.objects.prefix else f"/{key}"
        asked = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
        return f"{self.objects.access.endpoint}/{quote(path, safe='/~')}" + (f"?{asked}" if asked else "")

    def _signed(self, method: str, url: str, digest: str, headers: Mapping[str, str]) -> dict[str, str]:
        request = self._request_type(method=method, url=url, headers=dict(headers))
        access = self.objects.access
        signer = self._signer_type(access.credentials.get_frozen_credentials(), "s3", access.region)
        request.context["payload_sha256"] = digest
        signer.add_auth(request)
        return dict(request.headers)

    @cached_property
    def _request_type(self) -> Any:
        return backends.load("botocore.awsrequest", extra="s3").AWSRequest

    @cached_property
    def _signer_type(self) -> Any:
        base: Any = backends.load("botocore.auth", extra="s3").S3SigV4Auth

        class Signer(base):  # type: ignore[misc]
            """botocore would read the body again for a digest that is known."""

            def payload(self, request: Any) -> str:
                return str(request.context["payload_sha256"])

        return Signer


def _text(element: ElementTree.Element, name: str) -> str | None:
    return next((child.text for child in element if child.tag.rpartition("}")[2] == name), None)


def _escaped(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(text)
