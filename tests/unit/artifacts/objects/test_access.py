"""What is wrong with the address, the credentials or the bucket is said in words and hints; nothing is written."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import Answer, Exchange, Proxy, Server

from llmopt.artifacts import Manifest, Store
from llmopt.artifacts.objects.credentials import Access
from llmopt.artifacts.objects.s3 import S3Objects
from llmopt.cli.app import main
from llmopt.errors import LlmoptError

#: push("s3://...") -> exit code and stderr
Push = Callable[[str], tuple[int, str]]


@pytest.fixture
def push(small: tuple[Store, Manifest], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Push:
    store, manifest = small

    def run(url: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["store", "push", manifest.id, url, "--store", str(store.root)])
        return code, capfd.readouterr().err

    return run


def objects_in(server: Server, bucket: str) -> bytes:
    return server.request("GET", f"/{bucket}", query={"list-type": "2"}).body


def test_a_wrong_secret(s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(s3_server, secret_key="wrong").set_in(monkeypatch)
    assert push(f"s3://{bucket}/store") == (
        1,
        f"error: `{s3_server.endpoint}` refused the signature: the secret key is wrong\n\n"
        "hint: check `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_PROFILE`, are they of this endpoint?\n",
    )
    assert b"<Key>" not in objects_in(s3_server, bucket)


def test_an_unknown_access_key(s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(s3_server, access_key="nobody:atall").set_in(monkeypatch)
    code, said = push(f"s3://{bucket}/store")
    assert code == 1
    # Swift does not tell a key that it does not know from a wrong secret.
    assert "does not know the access key" in said or "the secret key is wrong" in said
    assert "hint: check `AWS_ACCESS_KEY_ID`" in said


def test_a_clock_that_is_off(s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    if s3_server.name == "rclone":
        pytest.skip("it does not look")
    import botocore.auth

    real = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: real() - datetime.timedelta(hours=2))
    s3_server.set_in(monkeypatch)
    with pytest.raises(LlmoptError, match="the clock of this machine and that of"):
        list(S3Objects.open(f"s3://{bucket}/store").list())


def test_no_such_bucket(s3_server: Server, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.set_in(monkeypatch)
    assert push("s3://no-such-bucket-here/store") == (
        1,
        f"error: there is no bucket `no-such-bucket-here` at `{s3_server.endpoint}`\n\n"
        "hint: create it, or check the name and the endpoint\n",
    )


def test_another_who_may_not_write(
    ceph_server_and_reader: tuple[Server, Server], push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = ceph_server_and_reader
    bucket = owner.new_bucket()
    reader.set_in(monkeypatch)
    code, said = push(f"s3://{bucket}/store")
    assert code == 1
    assert f"does not allow reading in the bucket `{bucket}`" in said


@pytest.fixture
def ceph_server_and_reader(ceph_cluster: Any) -> tuple[Server, Server]:
    ceph_cluster._run(
        "radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=other", "--display-name=other",
        "--access-key=otherkey", "--secret-key=othersecret",
    )  # fmt: skip
    server = ceph_cluster.server
    return server, replace(server, access_key="otherkey", secret_key="othersecret")


@pytest.mark.parametrize(
    ("endpoint", "code", "error", "hint"),
    [
        ("127.0.0.1:9000", 2, "the S3 endpoint `127.0.0.1:9000` has no scheme", "write `http://HOST:PORT`"),
        ("ftp://host", 2, "the S3 endpoint `ftp://host` has no scheme", "write `http://HOST:PORT`"),
        ("http://127.0.0.1:1", 1, "does not answer: connection refused", "check `AWS_ENDPOINT_URL`"),
        ("http://nobody.invalid", 1, "does not answer: its name is not known", "check `AWS_ENDPOINT_URL`"),
    ],
)
def test_an_endpoint_that_is_none(
    endpoint: str, code: int, error: str, hint: str, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server(name="", endpoint=endpoint, access_key="key", secret_key="secret").set_in(monkeypatch)
    begin = time.monotonic()
    found, said = push("s3://bucket/store")
    assert found == code
    assert error in said
    assert f"hint: {hint}" in said
    assert time.monotonic() - begin < 5


def test_no_server_of_s3(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that speaks HTTP and answers everything."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "list-type" not in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", "13")
            self.end_headers()
            self.wfile.write(b"<html>hi<br>\n")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        Server(name="", endpoint=endpoint, access_key="key", secret_key="secret").set_in(monkeypatch)
        code, said = push("s3://bucket/store")
        server.shutdown()
    assert code == 1
    assert f"error: `{endpoint}` answered 200 with no XML\n\nhint: is it an S3 server?" in said


@pytest.mark.parametrize(
    "url",
    ["s3://UPPER/x", "s3://ab/x", "s3:///x", "s3://", "s3://bucket//x", "s3://bucket/a/../b", "s3://bucket/./b",
     "s3://bucket/a//b", "s3://bu_cket-/x", "s3://-bucket/x"],
)  # fmt: skip
def test_an_address_that_is_none(url: str, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    Server(name="", endpoint="http://127.0.0.1:1", access_key="key", secret_key="secret").set_in(monkeypatch)
    code, said = push(url)
    assert code == 2
    assert said.startswith(f"error: `{url}` is not `s3://BUCKET/PREFIX`\n\nhint: ")


def test_a_prefix_that_holds_other_things(
    s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.set_in(monkeypatch)
    assert s3_server.request("PUT", f"/{bucket}/data/table.csv", body=b"1,2").status == 200
    for url in (f"s3://{bucket}", f"s3://{bucket}/data"):
        code, said = push(url)
        assert code == 2
        assert f"error: `{url}` is no store: it holds `" in said
        assert "table.csv`" in said
        assert "hint: name a prefix of its own" in said
    assert objects_in(s3_server, bucket).count(b"<Key>") == 1


def test_a_prefix_beside_other_things(
    s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name begins like theirs."""
    s3_server.set_in(monkeypatch)
    assert s3_server.request("PUT", f"/{bucket}/store-of-tables/table.csv", body=b"1,2").status == 200
    assert push(f"s3://{bucket}/store")[0] == 0


class TestAnswers:
    """Of any server, as it is the proxy that gives them."""

    @pytest.fixture
    def s3_server(self, rclone: Server) -> Server:
        return rclone

    @pytest.mark.parametrize(
        ("answer", "error", "hint"),
        [
            (Answer(status=400, code="ExpiredToken"), "the credentials have expired", "get new ones"),
            (Answer(status=403, code="ExpiredToken"), "the credentials have expired", "get new ones"),
            (Answer(status=400, code="InvalidToken"), "does not know the session token", "check `AWS_ACCESS_KEY_ID`"),
            (Answer(status=403, code="RequestTimeTooSkewed"), "differ too much", "set this machine's clock"),
            (Answer(status=403, code="AccessDenied"), "does not allow reading in the bucket", "ask for s3:ListBucket"),
            (Answer(status=403, code="Odd"), "does not allow reading in the bucket", "ask for s3:ListBucket"),
            (Answer(status=301, code="PermanentRedirect"), "is in another region", "set `AWS_REGION`"),
            (Answer(status=400, code="AuthorizationHeaderMalformed"), "is in another region", "set `AWS_REGION`"),
            (Answer(status=418, code="Tea", message="I am one."), "answered 418 Tea I am one", "run the command again"),
        ],
        ids=lambda value: value.code if isinstance(value, Answer) else "",
    )  # fmt: skip
    def test_what_the_server_refuses(
        self,
        answer: Answer,
        error: str,
        hint: str,
        proxy: Proxy,
        bucket: str,
        push: Push,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        proxy.server.set_in(monkeypatch)
        proxy.fail(with_=answer, times=None)
        code, said = push(f"s3://{bucket}/store")
        assert code == 1
        assert said.startswith("error: ")
        assert error in said
        assert f"hint: {hint}" in said
        assert proxy.count() == 1  # another try would be refused too

    def test_a_bucket_that_may_not_be_listed(
        self, proxy: Proxy, s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy.server.set_in(monkeypatch)

        def is_listing(request: Exchange) -> bool:
            return "list-type" in request.query

        proxy.fail(match=is_listing, with_=Answer(status=403, code="AccessDenied"), times=None)
        code, said = push(f"s3://{bucket}/store")
        assert code == 1
        assert f"error: `{proxy.server.endpoint}` does not allow listing in the bucket `{bucket}`" in said
        assert "hint: ask for s3:ListBucket on the bucket" in said
        assert b"<Key>" not in objects_in(s3_server, bucket)


class TestCredentials:
    @pytest.fixture
    def s3_server(self, rclone: Server) -> Server:
        return rclone

    @pytest.fixture
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Nothing of AWS's in the environment, and a home folder with nothing in it."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".aws").mkdir()
        return tmp_path

    def test_none_at_all(self, home: Path, push: Push) -> None:
        assert push("s3://bucket/store") == (
            1,
            "error: no AWS credentials are to be found\n\nhint: set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, "
            "or `AWS_PROFILE` for a profile of `~/.aws`\n",
        )

    def test_half_of_them(self, home: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        code, said = push("s3://bucket/store")
        assert code == 1
        assert said.startswith("error: the AWS configuration cannot be used: Partial credentials found in env")

    def test_a_profile_that_is_not_there(self, home: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "work")
        assert push("s3://bucket/store") == (
            2,
            "error: The config profile (work) could not be found\n\n"
            "hint: check `AWS_PROFILE`; `~/.aws/config` has the profiles\n",
        )

    def test_a_file_that_is_none(self, home: Path, push: Push) -> None:
        (home / ".aws" / "config").write_text("no section\n")
        code, said = push("s3://bucket/store")
        assert code == 1
        assert said.startswith("error: the AWS configuration cannot be used: Unable to parse config file")

    @pytest.mark.parametrize("where", ["profile", "services", "environment"])
    def test_of_files(
        self, where: str, home: Path, s3_server: Server, bucket: str, push: Push, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / ".aws" / "credentials").write_text(
            f"[work]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
        )
        config = {
            "profile": f"[profile work]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n",
            "services": "[profile work]\nregion = us-east-1\nservices = here\nendpoint_url = http://127.0.0.1:1\n"
            f"[services here]\ns3 =\n  endpoint_url = {s3_server.endpoint}\n",
            "environment": "[profile work]\nregion = us-east-1\nendpoint_url = http://127.0.0.1:1\n",
        }
        (home / ".aws" / "config").write_text(config[where])
        monkeypatch.setenv("AWS_PROFILE", "work")
        if where == "environment":
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
        assert push(f"s3://{bucket}/store")[0] == 0

    def test_the_region_is_that_of_the_profile(self, home: Path) -> None:
        (home / ".aws" / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
        (home / ".aws" / "config").write_text("[default]\nregion = eu-central-1\n")
        found = Access.find()
        assert (found.region, found.endpoint) == ("eu-central-1", "https://s3.eu-central-1.amazonaws.com")

    def test_a_session_token_goes_with_every_request(
        self, large: tuple[Store, Manifest], proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that knows no tokens answers as it likes; each request had it."""
        proxy.server.set_in(monkeypatch)
        monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
        objects = S3Objects.open(f"s3://{bucket}/store")
        for work in (
            lambda: objects.write("a", b"content"),
            lambda: objects.find("a"),
            lambda: objects.read("a", most=10),
            lambda: list(objects.list()),
            lambda: objects.sender("b", 20 << 20, "").send(1, b"x"),
            lambda: objects.delete(["a"]),
        ):
            try:
                work()
            except LlmoptError:
                continue
        assert {exchange.headers.get("x-amz-security-token") for exchange in proxy.exchanges} == {"the-token"}
        assert {exchange.method for exchange in proxy.exchanges} == {"PUT", "HEAD", "GET", "POST"}

    def test_new_ones_are_used_as_soon_as_they_are_there(
        self, home: Path, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that a program gives and that expire in a minute are asked for again."""
        server = proxy.server
        program = home / "credentials.sh"
        keys = f'"AccessKeyId": "{server.access_key}", "SecretAccessKey": "{server.secret_key}"'
        program.write_text(
            f"#!/bin/sh\necho asked >> {home}/asked\nsoon=$(date -u -d '+1 minute' +%Y-%m-%dT%H:%M:%SZ)\n"
            f'echo \'{{"Version": 1, {keys}, "Expiration": "\'$soon\'"}}\'\n'
        )
        program.chmod(0o755)
        (home / ".aws" / "config").write_text(
            f"[default]\ncredential_process = {program}\nendpoint_url = {server.endpoint}\nregion = us-east-1\n"
        )
        objects = S3Objects.open(f"s3://{bucket}/store")
        for _ in range(3):
            objects.write("a", b"content")
            assert [found.key for found in objects.list()] == ["a"]
        assert len((home / "asked").read_text().splitlines()) > 1
