"""Each server comes up, signs people in, keeps what it is given and goes when the tests go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servers import Server
from servers.ceph import Ceph
from servers.processes import listens


def test_an_object_comes_back(s3_server: Server) -> None:
    path = f"/{s3_server.new_bucket()}/a folder/a+b"
    assert s3_server.request("PUT", path, body=b"content").status == 200
    assert s3_server.request("GET", path).body == b"content"


def test_a_wrong_secret_is_refused(s3_server: Server) -> None:
    stranger = Server(name="", endpoint=s3_server.endpoint, access_key=s3_server.access_key, secret_key="wrong")
    assert stranger.request("PUT", f"/{s3_server.new_bucket()}/key", body=b"content").status == 403


def test_obstore_finds_the_server_by_its_environment(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.store import S3Store

    s3_server.set_in(monkeypatch)
    store = S3Store(s3_server.new_bucket(), client_options={"allow_http": True})
    store.put("a/b", b"content")
    assert bytes(store.get("a/b").bytes()) == b"content"


def test_botocore_finds_the_server_by_its_environment(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.session

    s3_server.set_in(monkeypatch)
    client = botocore.session.get_session().create_client("s3")
    bucket = s3_server.new_bucket()
    client.put_object(Bucket=bucket, Key="a/b", Body=b"content")
    assert client.get_object(Bucket=bucket, Key="a/b")["Body"].read() == b"content"
    client.close()


def test_no_setting_of_the_user_gets_through(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_PROFILE", "work")
    s3_server.set_in(monkeypatch)
    assert {name for name in os.environ if name.startswith("AWS_")} <= set(s3_server.environ())


def test_what_was_stored_outlives_a_killed_gateway(ceph_cluster: Ceph) -> None:
    path = f"/{ceph_cluster.server.new_bucket()}/key"
    ceph_cluster.server.request("PUT", path, body=b"content")
    ceph_cluster.kill_gateway()
    with pytest.raises(ConnectionError):
        ceph_cluster.server.request("GET", path)
    ceph_cluster.start_gateway()
    assert ceph_cluster.server.request("GET", path).body == b"content"


def test_two_cephs_run_at_once(ceph_cluster: Ceph, tmp_path: Path) -> None:
    other = Ceph(tmp_path)
    try:
        other.start()
        bucket = other.server.new_bucket()
        assert other.server.request("PUT", f"/{bucket}/key", body=b"content").status == 200
        assert ceph_cluster.server.request("GET", f"/{bucket}/key").status in (403, 404)
    finally:
        other.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_a_server_ends_with_tests_that_are_killed(rclone: Server, tmp_path: Path) -> None:
    """A process of its own starts rclone, tells where and kills itself."""
    program = f"""
import os, sys, pathlib
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from servers.rclone import running
with running(pathlib.Path({str(tmp_path)!r})) as server:
    print(server.endpoint, flush=True)
    os.kill(os.getpid(), {signal.SIGKILL.value})
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = Server(name="", endpoint=killed.stdout.strip(), access_key="", secret_key="")
    deadline = time.monotonic() + 10
    while listens(ended.port):
        assert time.monotonic() < deadline
        time.sleep(0.01)
