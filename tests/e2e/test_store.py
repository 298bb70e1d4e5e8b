"""The main job with its artifacts on S3: what one machine made, another finds."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import Server

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Machine:
    """llmopt as on a machine of its own: nothing is shared but the bucket."""

    cli: Any
    home: Path
    url: str
    server: Server

    def __call__(self, *arguments: object) -> Any:
        with self._environment():
            return self.cli(*arguments, "--store", self.url)

    def start(self, *arguments: object) -> Any:
        with self._environment():
            return self.cli.start(*arguments, "--store", self.url)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            self.server.set_in(patch)
            for name in ("cache", "data"):
                patch.setenv(f"XDG_{name.upper()}_HOME", str(self.home / name))
            yield

    def files(self) -> list[str]:
        return [path.name for path in self.home.rglob("*") if path.is_file()]


def test_a_pipeline_on_s3_is_found_whole_by_a_machine_that_has_nothing(
    llmopt: Any, rclone: Server, pipeline: Path, model: Path, tmp_path: Path
) -> None:
    url = f"s3://{rclone.new_bucket()}/team/llmopt"
    one, two = (Machine(llmopt, tmp_path / name, url, rclone) for name in ("one", "two"))
    made = one("run", pipeline, "--json").json
    assert made["cached"] is False
    found = two("run", pipeline, "--json").json
    assert found["cached"] is True
    assert [stage["artifact"] for stage in found["stages"]] == [stage["artifact"] for stage in made["stages"]]
    assert all(Path(stage["path"]).is_relative_to(two.home) for stage in found["stages"])

    ran = two("store", "verify")
    assert (ran.code, ran.out) == (0, "6 of 6 artifacts are whole\n"), ran.err
    engine = next(stage["artifact"] for stage in made["stages"] if stage["stage"] == "compile")
    three = Machine(llmopt, tmp_path / "three", url, rclone)
    node = three("store", "show", engine, "--lineage", "--json").json["lineage"]
    kinds = []
    while node is not None:
        kinds.append(node["kind"])
        node = next((below for below in node["inputs"] if below["input"] == "model"), None)
    assert kinds == ["engine", "quantized-model", "model"]
    assert not [name for name in three.files() if name.endswith((".safetensors", ".bin"))]

    process = two.start("serve", engine, "--port", 0)
    try:
        line = process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), process.stderr.read()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert not (tmp_path / "store").exists()  # the one that the environment names
