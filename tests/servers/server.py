"""A running S3 server, as a test sees it: where it is, how to sign in, and one signed request at a time."""

from __future__ import annotations

import http.client
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

import pytest


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def code(self) -> str:
        """S3's name of an error: `NoSuchKey`; empty where the server gave none."""
        found = re.search(rb"<Code>(.*?)</Code>", self.body)
        return found[1].decode() if found else ""


@dataclass(frozen=True, kw_only=True)
class Server:
    name: str
    endpoint: str  # http://127.0.0.1:PORT
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    @property
    def port(self) -> int:
        port = urlsplit(self.endpoint).port
        assert port is not None
        return port

    def environ(self) -> dict[str, str]:
        """What a client needs to find the server; nothing of the user's own settings gets past the files named here."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def set_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This process, and those it starts, see this server and no other AWS setting."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environ().items():
            monkeypatch.setenv(name, value)

    def new_bucket(self) -> str:
        bucket = f"test-{uuid.uuid4().hex[:16]}"
        reply = self.request("PUT", f"/{bucket}")
        assert reply.status == 200, (reply.status, reply.body)
        return bucket

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        sha256: str | None = None,
        timeout_s: float = 60,
    ) -> Reply:
        """Sign and send one request, without any retry; `path` is `/bucket/key`.

        `sha256` is signed in place of the body's own: a wrong one, or `UNSIGNED-PAYLOAD`.
        """
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        class Auth(S3SigV4Auth):
            def payload(self, request: AWSRequest) -> str:
                return sha256 or super().payload(request)

        target = quote(path) + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        request = AWSRequest(method, f"{self.endpoint}{target}", headers=dict(headers or {}), data=body)
        Auth(Credentials(self.access_key, self.secret_key), "s3", self.region).add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, target, body=body, headers=dict(request.headers.items()))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(status=response.status, headers=names, body=response.read())
        finally:
            connection.close()
