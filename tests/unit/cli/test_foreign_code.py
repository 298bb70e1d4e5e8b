"""Nothing that comes with a checkpoint is run: not its modules, not its pickles, whatever its configuration says."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Llmopt = Callable[..., Any]
SMALL = ("--method", "gptq", "--sweeps", 0, "--no-compensate", "--group-size", 32, "--samples", 4, "--seq-len", 32)
REPOSITORY = Path(__file__).resolve().parents[3]


class Malicious:
    """What a pickle runs when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What exists once any of the checkpoint's code has run."""
    return tmp_path / "it-was-run"


@pytest.fixture
def model(tiny: Path, tmp_path: Path, mark: Path) -> Path:
    """A good Llama that asks for modules of its own everywhere it can, beside a pickle."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "conftest.py", "setup.py"):
        (folder / name).write_text(code)
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_x.X",
            "AutoModelForCausalLM": "modeling_x.X",
            "AutoModel": "modeling_x.X",
        },
        trust_remote_code=True,
    )
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('x') }}",
    )
    edit(folder / "generation_config.json", custom_generate="modeling_x.py")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Malicious(mark)))
    return folder


def edit(file: Path, **values: object) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


def test_a_checkpoint_with_code_goes_through_every_stage_and_none_of_it_runs(
    llmopt: Llmopt, model: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)  # where `import modeling_x` would find it
    quantized = llmopt("quantize", model, *SMALL, "--json")
    assert quantized.code == 0
    assert llmopt("compile", quantized.json["artifact"]).code == 0
    assert llmopt("compile", model, "--target", "vllm").code == 3
    assert llmopt("eval", model, "--windows", 2, "--seq-len", 32).code == 0
    assert not mark.exists()
    files = {path.name for path in Path(quantized.json["path"]).rglob("*")}
    assert not {name for name in files if name.endswith((".py", ".bin"))}


def test_rows_rendered_by_a_malicious_template_run_nothing(
    llmopt: Llmopt, model: Path, mark: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    ran = llmopt("quantize", model, *SMALL, "--calib", rows)
    assert ran.code == 1
    assert "template" in ran.error
    assert not mark.exists()


def test_a_model_type_of_its_own_is_refused_and_not_run(llmopt: Llmopt, model: Path, mark: Path) -> None:
    edit(model / "config.json", model_type="x")
    for command in (["quantize", model, *SMALL], ["compile", model], ["eval", model]):
        ran = llmopt(*command)
        assert ran.code == 1
        assert "the model type `x` is not supported" in ran.error
        assert "its own code (`auto_map`) is never run" in ran.error
    assert not mark.exists()


def test_a_tokenizer_of_its_own_is_refused_without_a_question(llmopt: Llmopt, model: Path, mark: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("{}")
    ran = llmopt("compile", model)
    assert ran.code == 1
    assert "code of its own" in ran.error
    assert not mark.exists()


@pytest.fixture
def pickled(tiny: Path, tmp_path: Path, mark: Path) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(mark)))
    return folder


@pytest.mark.parametrize("command", ["quantize", "compile", "eval"])
def test_pickled_weights_are_refused_and_not_loaded(llmopt: Llmopt, pickled: Path, mark: Path, command: str) -> None:
    ran = llmopt(command, pickled)
    assert ran.code == 1
    assert "has its weights only as `pytorch_model.bin`, a pickle" in ran.error
    assert "hint: convert them once: `python -c" in ran.error
    assert not mark.exists()


def test_an_index_that_names_pickles_does_not_get_them_loaded(llmopt: Llmopt, pickled: Path, mark: Path) -> None:
    (pickled / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    ran = llmopt("quantize", pickled)
    assert ran.code == 1
    assert "names `pytorch_model.bin`, a pickle" in ran.error
    assert not mark.exists()


def test_the_command_of_the_hint_converts(llmopt: Llmopt, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "it's pickled"))
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = shlex.split(re.findall(r"`(python .*)`", llmopt("quantize", folder).err)[0])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=120)
    made = Path(command[-1])
    converted = load_file(made / "model.safetensors")
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    assert llmopt("quantize", made, "--method", "rtn", "--group-size", 32).code == 0


def test_no_module_of_ours_unpickles_or_trusts() -> None:
    """The client's own processes send each other pickles over a pipe of theirs; commands for a server may say trust."""
    found = {
        f"{file.relative_to(REPOSITORY)}: {call}"
        for file in (REPOSITORY / "llmopt").rglob("*.py")
        for call in re.findall(
            r"torch\.load\b|pickle\.loads?\b|joblib|allow_pickle=True|trust_remote_code=True|AutoConfig|AutoModel\w*\("
            r"|\bexec\(|(?<![\w.])eval\(",
            file.read_text(encoding="utf-8"),
        )
    }
    assert found == {"llmopt/bench/client/workers.py: pickle.loads"}
