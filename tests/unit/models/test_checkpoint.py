from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmopt.errors import LlmoptError
from llmopt.models.checkpoint import Checkpoint, bfloat16_to_float32, float32_to_bfloat16


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_every_tensor_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(4).half(),
        "c": torch.randn(2, 2),
        "d": torch.arange(6, dtype=torch.int32),
        "e": torch.tensor([True, False]),
        "f": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "g": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name, expected in tensors.items():
        got = checkpoint.tensor(name)
        assert got.dtype == expected.dtype
        assert torch.equal(
            got.view(torch.uint8) if got.ndim else got, expected.view(torch.uint8) if got.ndim else expected
        )


def test_shards_read_as_one(make_checkpoint: Callable[..., Path]) -> None:
    one, many = make_checkpoint("llama"), make_checkpoint("llama", shards=3)
    assert len(list(many.glob("*.safetensors"))) >= 3
    whole = load_file(one / "model.safetensors")
    checkpoint = Checkpoint.open(many)
    assert set(checkpoint.tensors) == set(whole)
    assert all(torch.equal(checkpoint.tensor(name), whole[name]) for name in whole)


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**126, min_value=-(2.0**126)),
        min_size=1,
    )
)
def test_bfloat16_rounds_as_torch_rounds(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = bfloat16_to_float32(float32_to_bfloat16(array))
    assert np.array_equal(ours, torch.from_numpy(array).bfloat16().float().numpy())


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no model folder"):
        Checkpoint.open(tmp_path / "absent")


def test_a_folder_without_config_is_an_error(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(LlmoptError, match=r"no `config.json`"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_an_error(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(LlmoptError, match="truncated"):
        Checkpoint.open(copy)


def test_a_missing_shard_is_an_error(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama", shards=3), tmp_path / "m"))
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(LlmoptError, match="is missing"):
        Checkpoint.open(folder)


def test_a_shard_without_a_promised_tensor_is_an_error(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("llama", shards=3), tmp_path / "m"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(LlmoptError, match="`ghost`"):
        Checkpoint.open(folder)


def test_an_index_that_leaves_its_folder_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "m.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(LlmoptError, match="outside its folder"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(LlmoptError, match=f"only as `{name}`, a pickle") as caught:
        Checkpoint.open(copy)
    assert caught.value.hint is not None
    assert f"{copy} {copy}-safetensors`" in caught.value.hint


def test_an_index_that_names_pickles_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(LlmoptError, match=r"names `pytorch_model\.bin`, a pickle") as caught:
        Checkpoint.open(copy)
    assert caught.value.hint is not None
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("content", ["{", "[]", "nonsense"])
def test_a_damaged_config_is_an_error(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(LlmoptError, match=r"config\.json"):
        Checkpoint.open(copy)


def test_a_header_that_disagrees_with_itself_is_an_error(copy: Path) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [1]
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(LlmoptError, match="disagree"):
        Checkpoint.open(copy)
