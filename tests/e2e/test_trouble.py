"""What goes wrong in mid-work: nothing half-made is left, and the next run is as if it had never been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Stage = Callable[[str], dict[str, Any]]


def kinds(llmopt: Any) -> list[str]:
    """Of the artifacts in the store: the calibration set is whole before the work begins."""
    return [artifact["kind"] for artifact in llmopt("store", "ls", "--json").json["artifacts"]]


def test_ctrl_c_in_mid_quantize_leaves_nothing(llmopt: Any, model: Path) -> None:
    process = llmopt.start("quantize", model, "--samples", 16, "--seq-len", 128)
    for line in process.stderr:
        if line.startswith("block 1/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted; nothing half-written is left"
    assert "Traceback" not in err
    assert list((llmopt.store / "tmp").iterdir()) == []
    assert kinds(llmopt) == ["calibration"]
    assert llmopt("store", "verify").code == 0


def test_a_kill_in_mid_quantize_is_cleaned_up_by_the_next_run(llmopt: Any, model: Path) -> None:
    process = llmopt.start("quantize", model, "--samples", 16, "--seq-len", 128)
    for line in process.stderr:
        if line.startswith("block 2/"):
            process.kill()
            break
    process.communicate(timeout=60)
    assert any((llmopt.store / folder).glob("*") for folder in ("tmp", "begun"))
    assert kinds(llmopt) == ["calibration"]
    assert not llmopt("quantize", model, "--samples", 4, "--seq-len", 64, "--json").json["cached"]
    assert list((llmopt.store / "tmp").iterdir()) == []
    assert llmopt("store", "verify").code == 0


def test_a_full_disk_is_an_error_and_leaves_nothing(llmopt: Any, model: Path) -> None:
    llmopt.store.mkdir()
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 10
    mount = f"mount -t tmpfs -o size={size} tmpfs {llmopt.store}"
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    work = " ".join(llmopt.command("quantize", model, "--method", "rtn"))
    found = "find blobs manifests actions -type f 2>/dev/null"  # what a later run could take for a result
    script = f"{mount} && {work}; code=$?; cd {llmopt.store}; {found}; exit $code"
    ran = subprocess.run(
        [*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=120, env=llmopt.environment
    )
    assert ran.returncode == 1, ran.stderr
    error = ran.stderr[ran.stderr.index("error: ") :]
    assert f"the disk of the store `{llmopt.store}`" in error
    assert "--store" in error
    assert ran.stdout == ""


def test_two_at_once_make_the_same_artifact(llmopt: Any, model: Path) -> None:
    small = ("quantize", model, "--method", "rtn", "--json")
    processes = [llmopt.start(*small) for _ in range(2)]
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert len(llmopt("store", "ls", "--json").json["artifacts"]) == 1
    assert llmopt("store", "verify").code == 0


def test_a_corrupt_result_is_made_again_and_a_corrupt_input_is_refused(llmopt: Any, model: Path) -> None:
    made = llmopt("quantize", model, "--method", "rtn", "--json").json
    blobs = (path for path in (llmopt.store / "blobs").rglob("*") if path.is_file())
    blob = max(blobs, key=lambda path: path.stat().st_size)
    whole = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    refused = llmopt("compile", made["artifact"])
    assert refused.code == 4
    assert refused.out == ""
    assert "error: " in refused.err
    healed = llmopt("quantize", model, "--method", "rtn", "--json")
    assert healed.json["artifact"] == made["artifact"]
    assert "damaged" in healed.err
    assert blob.read_bytes() == whole


def test_a_server_that_dies_under_load_is_an_invalid_measurement(shared: Any, stage: Stage) -> None:
    engine = stage("compile")["artifact"]
    process = shared.start("bench", engine, "--duration", 60, "--concurrency", "2", "--prompt-tokens", 16)
    time.sleep(0.1)
    for line in process.stderr:
        if "starting its server" in line:
            break
    server = wait_for_server(process.pid)
    time.sleep(1)
    os.kill(server, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert out == ""
    error = err[err.index("error: ") :]
    assert "died under load" in error
    assert "Traceback" not in error


def wait_for_server(parent: int) -> int:
    """The child of the bench that listens, once it does."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for child in children(parent):
            if listens(child):
                return child
        time.sleep(0.05)
    raise AssertionError("no server came up")


def children(parent: int) -> list[int]:
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def listens(process: int) -> bool:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    try:
        return any(str(link.readlink()) in listening for link in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
