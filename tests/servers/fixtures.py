"""The fixtures `rclone`, `ceph`, `swift` and `s3_server`, and which tests run on which server.

LLMOPT_TEST_S3 names the servers to test on (rclone alone where it is not set). A test that wants another is
deselected, and a test on any of them bears the marker `s3`. A server starts when the first test asks for it. rclone,
which is always there, may be asked for beside another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from servers import rclone as rclone_module
from servers import swift as swift_module
from servers.ceph import Ceph
from servers.server import Server

NAMES = ("rclone", "ceph", "swift")
#: Fixtures that start a server, and which.
STARTS = {"rclone": "rclone", "ceph": "ceph", "ceph_cluster": "ceph", "swift": "swift"}


def chosen() -> set[str]:
    names = {name.strip() for name in os.environ.get("LLMOPT_TEST_S3", "rclone").split(",") if name.strip()}
    if unknown := names - set(NAMES):
        raise pytest.UsageError(f"LLMOPT_TEST_S3: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return names


def wanted(item: pytest.Item) -> set[str]:
    servers = {STARTS[name] for name in getattr(item, "fixturenames", ()) if name in STARTS}
    if callspec := getattr(item, "callspec", None):
        servers |= {value for value in callspec.params.values() if isinstance(value, str) and value in NAMES}
    return servers


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    available = chosen()
    left_out = []
    for item in items:
        if servers := wanted(item):
            item.add_marker("s3")
            if not servers & available or not servers <= available | {"rclone"}:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("rclone")
    with rclone_module.running(folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def ceph_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """For tests that kill the gateway; they start it again."""
    cluster = Ceph(tmp_path_factory.mktemp("ceph"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(cluster.folder)


@pytest.fixture(scope="session")
def ceph(ceph_cluster: Ceph) -> Server:
    return ceph_cluster.server


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("swift")
    with swift_module.running(folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture(scope="session", params=NAMES)
def s3_server(request: pytest.FixtureRequest) -> Server:
    """Each server that the tests run on, in turn."""
    server: Server = request.getfixturevalue(request.param)
    return server
