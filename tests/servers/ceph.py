"""Ceph's RADOS gateway on one machine: a monitor, one OSD and radosgw, all on 127.0.0.1 and under one folder.

Version 16.2 compares `If-Match` with an ETag without its quotes, so that a right one, in them, is refused; ignores
`x-amz-checksum-*`, and `If-None-Match` on completing an upload, whose reply holds an empty ETag.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import uuid
from pathlib import Path

from servers.processes import answers, environment, free_ports, start, stop, wait_until
from servers.server import Server

#: What has to be on PATH, and the Debian package it is in.
PROGRAMS = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph": "ceph-common", "radosgw": "radosgw"}

CONFIG = """\
[global]
fsid = {fsid}
mon host = {mon_host}
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail crit = 1
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
run dir = {folder}
log file = {folder}/log/$name.log
admin socket =
pid file =
keyring = {folder}/keyring
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 12884901888
bluestore fsck on mount = false
osd memory target = 939524096
osd scrub load threshold = 100
[client.rgw]
# Without tcp_nodelay each GET takes 44 ms: a head and a body, and the client's delayed acknowledgement between them.
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw enable usage log = false
rgw dynamic resharding = false
debug rgw = 0
"""


class Ceph:
    """A cluster in `folder`, which is to be empty. `start` takes about ten seconds on a quiet machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port, mon, mon_v1 = free_ports(3)
        self.mon_host = f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]"
        self.server = Server(
            name="ceph", endpoint=f"http://127.0.0.1:{port}", access_key="cephkey", secret_key="cephsecret"
        )
        self.config = folder / "ceph.conf"
        self.log = folder / "log" / "output"
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.gateway: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
        assert not missing, f"`make test-s3` installs the Debian packages {' '.join(missing)}"
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for part in ("mon", "osd", "log"):
            (self.folder / part).mkdir()
        self.config.write_text(
            CONFIG.format(fsid=fsid, mon_host=self.mon_host, folder=self.folder, port=self.server.port)
        )
        keyring, monmap = self.folder / "keyring", self.folder / "monmap"
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "osd.0", "client.rgw"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", self.mon_host, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self.daemons.append(self._start("ceph-mon", "-i", "a"))
        self._run("ceph", "osd", "create", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.daemons.append(self._start("ceph-osd", "-i", "0"))
        wait_until(lambda: b" 1 up" in self._run("ceph", "osd", "stat"), self.daemons[-1], self.log)
        user = ["--uid=test", "--display-name=test"]
        keys = [f"--access-key={self.server.access_key}", f"--secret-key={self.server.secret_key}"]
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", *user, *keys)
        self.start_gateway()

    def start_gateway(self, *, nodelay: bool = True) -> None:
        """Returns when radosgw answers; also after `kill_gateway`, on the same port. Its own default is no nodelay."""
        assert self.gateway is None
        text = self.config.read_text().replace("tcp_nodelay=0", "tcp_nodelay=1")
        self.config.write_text(text if nodelay else text.replace("tcp_nodelay=1", "tcp_nodelay=0"))
        self.gateway = self._start("radosgw", "-n", "client.rgw")
        wait_until(lambda: answers(self.server.port), self.gateway, self.log)

    def kill_gateway(self) -> None:
        """kill -9: whatever radosgw had in hand is lost; the monitor and the OSD live on."""
        assert self.gateway is not None
        stop(self.gateway, how=signal.SIGKILL)
        self.gateway = None

    def remove_bucket(self, bucket: str) -> None:
        """With all that is in it, whose space is free at once; what is deleted through S3 keeps it for two hours."""
        self._run(
            *("radosgw-admin", "-n", "client.rgw", "bucket", "rm"),
            *(f"--bucket={bucket}", "--purge-objects", "--bypass-gc", "--yes-i-really-mean-it"),
        )

    def stop(self) -> None:
        """The cluster is thrown away after this, so nothing is given time to end well (radosgw takes seconds)."""
        if self.gateway is not None:
            self.kill_gateway()
        while self.daemons:
            stop(self.daemons.pop(), how=signal.SIGKILL)

    def _run(self, program: str, *arguments: str | Path) -> bytes:
        command = [program, "-c", self.config, *arguments]
        done = subprocess.run(command, capture_output=True, env=environment(), timeout=60)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return start([program, "-c", self.config, "-f", *arguments], self.log, environment())
