"""The requests that obstore has not: uploads in parts that go on after a cut, and listings that stop at nothing.

obstore uploads in parts too, but begins anew after a crash; what the server has of an upload is asked here, not
remembered. Its listings refuse the keys of others that it could not write. So these few requests are made here, signed
by botocore; each part is signed with its own sha256, which the server checks. Source: Amazon S3 API reference,
CreateMultipartUpload, UploadPart, ListParts, CompleteMultipartUpload, ListMultipartUploads, ListObjectsV2.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree

from llmopt import backends
from llmopt.artifacts.objects import Found, GoneError, LostUploadError, errors, parts_of
from llmopt.artifacts.objects.errors import RefusedError
from llmopt.artifacts.objects.retries import again
from llmopt.artifacts.threads import apart
from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from llmopt.artifacts.objects.s3 import S3Objects

CONNECT_S, SILENCE_S = 10.0, 60.0
_CONNECTIONS = 16
_MOST_SAID = 64 << 10  # bytes of an error


class Upload:
    """See `Sender`. Its id is found again by asking which uploads of the key are open."""

    def __init__(
        self, wire: Wire, key: str, size: int, upload_id: str, there: Mapping[int, tuple[int, str]], *, keep: bool
    ) -> None:
        """`keep`: another try can go on with the parts."""
        self._wire, self._key, self._size, self._id, self._keep = wire, key, size, upload_id, keep
        spans = parts_of(size)
        self._tags = {n: there[n][1] for n, begin, end in spans if n in there and there[n][0] == end - begin}
        self.parts: Sequence[tuple[int, int, int]] = [span for span in spans if span[0] not in self._tags]
        self._finished = False

    @classmethod
    def begin(cls, objects: S3Objects, key: str, size: int, digest: str) -> Upload:
        """A new one, or where the key is the digest of the bytes, so that parts fit, the last that was begun for it."""
        wire = Wire.of(objects)
        keep = key.endswith(f"/{digest}")
        for upload_id in wire.open_uploads(key) if keep else ():
            there = wire.parts(key, upload_id)
            if there is not None:
                return cls(wire, key, size, upload_id, there, keep=keep)
        root = wire.xml("POST", key, {"uploads": ""}, what="writing")
        begun = _text(root, "UploadId")
        if begun is None:
            raise LlmoptError(f"`{objects.access.endpoint}` began no upload", hint="is it an S3 server?")
        return cls(wire, key, size, begun, {}, keep=keep)

    def send(self, number: int, data: bytes | memoryview) -> None:
        if self._finished:
            return
        query = {"partNumber": str(number), "uploadId": self._id}
        try:
            _, headers, _ = self._wire.request("PUT", self._key, query, data, what="writing")
        except RefusedError as error:
            self._require_finished(error)
        else:
            self._tags[number] = headers.get("etag", "")

    def finish(self, headers: Mapping[str, str] | None = None) -> None:
        if self._finished:
            return
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{_escaped(tag)}</ETag></Part>"
            for number, tag in sorted(self._tags.items())
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        try:
            self._wire.xml("POST", self._key, {"uploadId": self._id}, body, what="writing", headers=headers)
        except RefusedError as error:
            if headers is not None:
                raise
            self._require_finished(error)
        self._finished = True

    def give_up(self) -> None:
        """Parts that can be gone on with stay; `abort_old` removes those that nobody came back to."""
        if not self._keep and not self._finished:
            self._finished = True
            self._wire.request("DELETE", self._key, {"uploadId": self._id}, what="deleting")

    def _require_finished(self, error: RefusedError) -> None:
        """Raise the error, unless the upload is an object now: by a try whose answer was lost, or by another process
        that sends the same bytes."""
        if error.s3_code not in ("NoSuchUpload", "InvalidPart"):
            raise error
        for pause_s in (0, 0.1, 0.2, 0.4, 0.8):  # rclone forgets the upload before the object is there
            time.sleep(pause_s)
            found = self._wire.objects.find(self._key)
            if found is not None and found.size == self._size:
                self._finished = True
                return
        raise LostUploadError(error.message, hint=error.hint) from None


def abort_old(objects: S3Objects, prefix: str, before_s: float, *, except_for: Collection[str] = ()) -> int:
    """Remove the parts of uploads below `prefix` that were begun before this time (seconds since 1970), but for those
    of keys that end in one of these names; how many were removed."""
    wire, count = Wire.of(objects), 0
    for upload in list(wire.uploads(prefix)):
        begun, key, upload_id = (_text(upload, name) for name in ("Initiated", "Key", "UploadId"))
        if begun is None or key is None or upload_id is None or key.rpartition("/")[2] in except_for:
            continue
        if _seconds(begun) < before_s:
            try:
                wire.request("DELETE", wire.below(key), {"uploadId": upload_id}, what="deleting")
                count += 1
            except RefusedError as error:  # somebody else has removed or finished it
                if error.s3_code != "NoSuchUpload":
                    raise
    return count


def conditional_completion(objects: S3Objects, key: str) -> bool:
    """Whether completing an upload can be refused where there is an object already."""
    objects.write(key, b"first")
    upload = Upload.begin(objects, key, 6, "")
    upload.send(1, b"second")
    try:
        upload.finish({"If-None-Match": "*"})
        return objects.read(key, most=100) == b"first"
    except LlmoptError:
        return True
    finally:
        with suppress(LlmoptError):  # the server may have dropped it
            upload.give_up()
        objects.delete([key])


def wrong_digest(objects: S3Objects, key: str) -> bool:
    """Whether bytes that are not those that the request was signed with are refused."""
    wire, other = Wire.of(objects), hashlib.sha256(b"bytes").hexdigest()
    try:
        wire.request("PUT", key, {}, b"other bytes", what="writing", digest=other, once=True)
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
            timeout=urllib3.Timeout(connect=CONNECT_S, read=SILENCE_S),
            cert_reqs="CERT_REQUIRED",
        )

    @classmethod
    def of(cls, objects: S3Objects) -> Wire:
        """One for each `S3Objects`."""
        with _MAKING:
            found = vars(objects).get("_wire") or cls(objects)
            vars(objects)["_wire"] = found
        assert isinstance(found, cls)
        return found

    def below(self, key: str) -> str:
        """The key of an object within the prefix, of one in the bucket."""
        return key.removeprefix(f"{self.objects.prefix}/") if self.objects.prefix else key

    def list(self, prefix: str) -> Iterator[Found]:
        """Every key that begins so, whatever others have put there; in the order of their keys."""
        query = {"list-type": "2", "prefix": self._whole(prefix), "encoding-type": "url"}
        while True:
            root = self.xml("GET", None, query, what="listing")
            encoded = _text(root, "EncodingType") == "url"
            for child in root:
                if child.tag.rpartition("}")[2] == "Contents":
                    key, size, modified = (_text(child, name) or "" for name in ("Key", "Size", "LastModified"))
                    key = self.below(unquote_plus(key) if encoded else key)
                    if key:  # else it is the folder itself, as consoles make it
                        yield Found(key, int(size or 0), _seconds(modified), _text(child, "ETag"))
            token = _text(root, "NextContinuationToken")
            if _text(root, "IsTruncated") != "true" or not token:
                return
            query["continuation-token"] = token

    def open_uploads(self, key: str) -> Iterator[str]:
        """The ids of the uploads of this very key, the newest first."""
        found = [
            (_text(upload, "Initiated") or "", identity)
            for upload in self.uploads(key)
            if self.below(_text(upload, "Key") or "") == key and (identity := _text(upload, "UploadId"))
        ]
        yield from (identity for _, identity in sorted(found, reverse=True))

    def uploads(self, prefix: str) -> Iterator[ElementTree.Element]:
        query = {"uploads": "", "prefix": self._whole(prefix)}
        while True:
            try:
                root = self.xml("GET", None, query, what="listing")
            except RefusedError:  # not every server can list them
                return
            yield from (child for child in root if child.tag.rpartition("}")[2] == "Upload")
            marker, upload_marker = _text(root, "NextKeyMarker"), _text(root, "NextUploadIdMarker")
            if _text(root, "IsTruncated") != "true" or not marker:
                return
            query |= {"key-marker": marker, "upload-id-marker": upload_marker or ""}

    def read_range(self, key: str, begin: int, end: int) -> bytes:
        """By `Range`, whatever the status of the answer says of it."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        try:
            _, answered, data = self.request("GET", key, {}, what="reading", headers=headers, most=end)
        except RefusedError as error:
            if error.s3_code == "InvalidRange" or error.status == 416:
                return b""
            raise
        return data if "content-range" in answered else data[begin:end]

    def parts(self, key: str, upload_id: str) -> dict[int, tuple[int, str]] | None:
        """Size and tag of each part that the server has; None when it does not know the upload."""
        found: dict[int, tuple[int, str]] = {}
        query = {"uploadId": upload_id}
        while True:
            try:
                root = self.xml("GET", key, query, what="listing")
            except RefusedError:
                return None
            for part in (child for child in root if child.tag.rpartition("}")[2] == "Part"):
                number, size, tag = (_text(part, name) for name in ("PartNumber", "Size", "ETag"))
                if number and size and tag:
                    found[int(number)] = (int(size), tag)
            marker = _text(root, "NextPartNumberMarker")
            if _text(root, "IsTruncated") != "true" or not marker or marker == query.get("part-number-marker"):
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
        most: int | None = None,
        once: bool = False,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The answer of a request, tried again (but `once`) while the server is busy or the connection breaks.

        It is signed with the `digest` of the body, by default the true one. An answer that says it is longer than
        `most` bytes is not read.
        """
        url = self._url(key, query)
        digest = digest or hashlib.sha256(body).hexdigest()

        def ask() -> tuple[int, Mapping[str, str], bytes]:
            signed = self._signed(method, url, digest, headers or {})
            try:
                answer = self._pool.request(
                    method, url, body=body or None, headers=signed, redirect=False, preload_content=False
                )
                try:
                    names = {name.lower(): value for name, value in answer.headers.items()}
                    if most is not None and answer.status < 300 and int(names.get("content-length") or 0) > most:
                        raise LlmoptError(
                            f"`{self.objects.access.endpoint}` cannot read a part of an object",
                            hint="use another server",
                        )
                    data = answer.read() if answer.status < 300 else answer.read(_MOST_SAID)
                finally:
                    answer.close()  # of the connection too, unless all was read
            except self._errors.HTTPError as error:
                raise _SaidError(str(error), passing=True) from None
            self.objects.met = True
            # S3 may answer 200 and then fail, with the error in what should be the result.
            if answer.status < 300 and not (method == "POST" and b"<Error>" in data[:400]):
                return answer.status, names, data
            status = f"status: {answer.status if answer.status >= 300 else 500} "
            raise _SaidError(status + data.decode(errors="replace"))

        def passing(error: Exception) -> bool:
            return not once and isinstance(error, _SaidError) and error.passing

        try:
            return apart(lambda: again(ask, passing=passing, met=lambda: self.objects.met))
        except _SaidError as error:
            if errors.code_of(error.text) == "NoSuchKey":
                raise GoneError(f"`{self.objects.url}/{key}` is missing") from None
            raise self.objects.tell(error.text, what) from None

    def _whole(self, prefix: str) -> str:
        return f"{self.objects.prefix}/{prefix}" if self.objects.prefix else prefix

    def _url(self, key: str | None, query: Mapping[str, str]) -> str:
        path = self.objects.bucket
        if key is not None:
            path += f"/{self.objects.prefix}/{key}" if self.objects.prefix else f"/{key}"
        asked = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
        return f"{self.objects.access.endpoint}/{quote(path, safe='/~')}" + (f"?{asked}" if asked else "")

    def _signed(self, method: str, url: str, digest: str, headers: Mapping[str, str]) -> dict[str, str]:
        request = self._request_type(method=method, url=url, headers=dict(headers))
        access = self.objects.access
        signer = self._signer_type(access.frozen(), "s3", access.region)
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


class _SaidError(Exception):
    def __init__(self, text: str, *, passing: bool = False) -> None:
        self.text, self.passing = text, passing or errors.is_passing(text)


_MAKING = threading.Lock()


def _seconds(stamp: str) -> float:
    """Since 1970."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def _text(element: ElementTree.Element, name: str) -> str | None:
    return next((child.text for child in element if child.tag.rpartition("}")[2] == name), None)


def _escaped(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(text)
