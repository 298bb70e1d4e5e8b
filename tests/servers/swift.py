"""OpenStack Swift with its S3 API on one machine: four servers and memcached, all on 127.0.0.1, one copy of each.

Version 2.38 answers `PUT` with `If-Match` with 501, and of several who `PUT` with `If-None-Match: *` at once more than
one may win.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from servers.processes import answers, environment, free_ports, listens, start, stop, wait_until
from servers.server import Server

BIN = Path(__file__).resolve().parents[2] / ".venv-swift" / "bin"
STORAGE = ("account", "container", "object")

HASHES = """\
[swift-hash]
swift_hash_path_prefix = llmopt
swift_hash_path_suffix = test
[storage-policy:0]
name = one
default = yes
"""
DEFAULT = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}/etc
user = {user}
workers = 0
log_level = WARNING
"""
STORAGE_SERVER = """\
devices = {folder}/dev
mount_check = false
recon_cache_path = {folder}/cache
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY_SERVER = """\
[pipeline:main]
pipeline = catch_errors proxy-logging cache listing_formats bulk s3api tempauth slo dlo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
force_swift_request_proxy_log = false
s3_acl = false
allow_multipart_uploads = true
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A cluster in `folder`, which is to be empty, on a file system with extended attributes. Up in a few seconds."""
    assert (BIN / "swift-proxy-server").exists(), f"`make test-s3` installs Swift into {BIN.parent}"
    assert shutil.which("memcached"), "`make test-s3` installs the Debian package memcached"
    etc, env, user = folder / "etc", environment(SWIFT_DIR=str(folder / "etc")), getpass.getuser()
    for part in ("dev/d1", "etc", "cache", "log"):
        (folder / part).mkdir(parents=True)
    memcached, proxy, *storage = free_ports(2 + len(STORAGE))
    (etc / "swift.conf").write_text(HASHES)
    for name, port in zip(STORAGE, storage, strict=True):
        head = DEFAULT.format(port=port, folder=folder, user=user)
        (etc / f"{name}.conf").write_text(head + STORAGE_SERVER.format(folder=folder, name=name))
        for step in (("create", "4", "1", "1"), ("add", f"r1z1-127.0.0.1:{port}/d1", "1"), ("rebalance",)):
            command = [BIN / "swift-ring-builder", f"{name}.builder", *step]
            subprocess.run(command, cwd=etc, env=env, check=True, capture_output=True, timeout=60)
    head = DEFAULT.format(port=proxy, folder=folder, user=user)
    (etc / "proxy.conf").write_text(head + PROXY_SERVER.format(memcached=memcached))

    with ExitStack() as stack:

        def up(name: str, *command: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
            log = folder / "log" / name
            process = start(command, log, env)
            stack.callback(stop, process, patience_s=3)
            return process, log

        cache = up("memcached", "memcached", "-u", user, "-l", "127.0.0.1", "-p", str(memcached), "-m", "64")
        servers = [up(name, BIN / f"swift-{name}-server", etc / f"{name}.conf") for name in (*STORAGE, "proxy")]
        wait_until(lambda: listens(memcached), *cache)
        for port, server in zip((*storage, proxy), servers, strict=True):
            wait_until(lambda port=port: answers(port), *server)
        yield Server(name="swift", endpoint=f"http://127.0.0.1:{proxy}", access_key="test:tester", secret_key="testing")
