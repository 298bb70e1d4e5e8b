from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes a slow example, not a wrong one.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TRUTH_SERVER = Path(__file__).parent / "odd_server.py"


class Truth:
    """A truth server that runs for the whole session; `url` gives its address with a behaviour."""

    def __init__(self, root: str) -> None:
        self.root = root

    def url(self, behaviour: str = "plain") -> str:
        return f"{self.root}/{behaviour}"

    def log(self) -> list[dict[str, Any]]:
        """What it was asked and when it sent which chunk, in order of arrival; by the monotonic clock."""
        with urllib.request.urlopen(f"{self.root}/log", timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)
        return found


@pytest.fixture(scope="session")
def truth() -> Iterator[Truth]:
    process = subprocess.Popen([sys.executable, str(TRUTH_SERVER)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            process.stdout.readline()
            yield Truth(process.stdout.readline().split()[1])
        finally:
            process.kill()


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[[str], Path]:
    """A folder that `fake_serve` serves with a behaviour of the truth server."""

    def make(behaviour: str = "", name: str = "engine") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "engine.json").write_text(json.dumps({"schema": "llmopt.engine/1", "max_context_tokens": 1024}))
        (folder / "behaviour.txt").write_text(behaviour)
        return folder

    return make


@pytest.fixture
def fake_serve() -> Callable[[Path], list[str]]:
    def command(engine: Path) -> list[str]:
        return [sys.executable, str(TRUTH_SERVER), (engine / "behaviour.txt").read_text()]

    return command


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 600 tokens that adds a beginning-of-sequence token, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from llmopt.profiles import HELDOUT_TEXT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(HELDOUT_TEXT.read_text(encoding="utf-8")[:60_000].splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file
