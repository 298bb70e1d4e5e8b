"""Calibration sets: which ids come from which text, and that the same inputs give the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmopt import calibrate
from llmopt.artifacts.outcome import silent
from llmopt.calibrate import CalibrationSettings
from llmopt.errors import LlmoptError
from llmopt.models.text import read_calibration, read_tokens, windows

TEXTS = [f"This is row {i}, and it says {'so ' * (i % 7)}much." for i in range(200)]
EOS = 0
GOLDEN = "4b5f9bef44016242df6d92dc26a63310694ac474ac5c50dbb5a4ecbc2c67d6bd"


def rows(**changes: Any) -> CalibrationSettings:
    values = {"samples": 4, "seq_len": 32, "seed": 0, "packing": "rows", "eos_token_id": EOS}
    return CalibrationSettings(**(values | changes))


def json_lines(file: Path, values: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return json_lines(tmp_path / "texts.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])


def encode(model: Path, text: str, **options: Any) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, **options).ids)


def test_a_plain_text_is_cut_whole_and_windows_are_drawn(tiny: Path, text: Path) -> None:
    settings = CalibrationSettings(samples=8, seq_len=64, seed=3, packing="text")
    made = calibrate.make(tiny, [text], settings)
    expected = windows(read_tokens(tiny, text), count=8, length=64, seed=3, what="text")
    assert np.array_equal(made.ids, expected)
    assert made.rows == ()


def test_the_windows_of_the_shipped_text_are_those_of_the_first_release() -> None:
    """Whoever quantizes the shipped model with the defaults gets the ids that the published figures were made with."""
    root = Path(__file__).resolve().parents[2]
    text = root / "llmopt" / "profiles" / "text" / "calibration.txt"
    settings = CalibrationSettings(samples=128, seq_len=512, seed=0, packing="text")
    ids = calibrate.make(root / "demo" / "model", [text], settings).ids
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == GOLDEN


def test_a_set_can_be_made_without_a_store(tiny: Path, text: Path, tmp_path: Path) -> None:
    folder = calibrate.from_text(tiny, text, tmp_path / "set", samples=8, seq_len=64, seed=3)
    settings = CalibrationSettings(samples=8, seq_len=64, seed=3, packing="text")
    assert np.array_equal(read_calibration(folder), calibrate.make(tiny, [text], settings).ids)
    assert calibrate.read_about(folder)["samples"] == 8


def test_rows_are_joined_by_the_end_of_text_in_the_order_in_which_they_were_drawn(tiny: Path, texts: Path) -> None:
    made = calibrate.make(tiny, [texts], rows())
    stream: list[int] = []
    for row in made.rows:
        stream += ([EOS] if stream else []) + encode(tiny, TEXTS[row])
    assert made.ids.shape == (4, 32)
    assert made.ids.reshape(-1).tolist() == stream[: 4 * 32]
    assert len(set(made.rows)) == len(made.rows)
    assert list(made.rows) != sorted(made.rows)


def test_no_more_rows_are_read_than_are_needed(tiny: Path, texts: Path) -> None:
    made = calibrate.make(tiny, [texts], rows())
    without_last = sum(len(encode(tiny, TEXTS[row])) + 1 for row in made.rows[:-1])
    assert without_last - 1 < 4 * 32


def test_the_seed_draws_other_rows_and_the_same_seed_the_same(tiny: Path, texts: Path) -> None:
    first, again, other = (calibrate.make(tiny, [texts], rows(seed=seed)) for seed in (1, 1, 2))
    assert first.rows == again.rows
    assert np.array_equal(first.ids, again.ids)
    assert first.rows != other.rows


def test_several_files_are_one_list_of_rows(tiny: Path, tmp_path: Path, texts: Path) -> None:
    parts = [
        json_lines(tmp_path / name, [{"text": text} for text in part])
        for name, part in (("a.jsonl", TEXTS[:50]), ("b.jsonl", TEXTS[50:]))
    ]
    assert calibrate.make(tiny, parts, rows()).rows == calibrate.make(tiny, [texts], rows()).rows


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_packed_file_is_the_same(tiny: Path, texts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(texts.read_bytes()))
    packed, plain = (calibrate.make(tiny, [file], rows()) for file in (tmp_path / name, texts))
    assert np.array_equal(packed.ids, plain.ids)


def test_parquet_is_the_same(tiny: Path, texts: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": list(range(len(TEXTS))), "text": TEXTS}), file, row_group_size=30)
    made, plain = calibrate.make(tiny, [file], rows()), calibrate.make(tiny, [texts], rows())
    assert np.array_equal(made.ids, plain.ids)
    with pytest.raises(LlmoptError, match="has no column `body`") as caught:
        calibrate.make(tiny, [file], rows(field="body"))
    assert "`n`, `text`" in str(caught.value.hint)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LlmoptError, match="cannot be read as parquet"):
        calibrate.make(tiny, [file], rows())


def test_another_field_can_be_the_text(tiny: Path, tmp_path: Path, texts: Path) -> None:
    file = json_lines(tmp_path / "body.jsonl", [{"text": "no", "body": text} for text in TEXTS])
    found = calibrate.make(tiny, [file], rows(field="body"))
    assert np.array_equal(found.ids, calibrate.make(tiny, [texts], rows()).ids)


def test_a_row_without_a_value_adds_nothing(tiny: Path, tmp_path: Path) -> None:
    values = [{"text": None}, {"text": "some words and more"}, {"text": ""}] * 30
    made = calibrate.make(tiny, [json_lines(tmp_path / "gaps.jsonl", values)], rows())
    one = [*encode(tiny, "some words and more"), EOS]
    assert made.ids.reshape(-1).tolist() == (one * 100)[: 4 * 32]


def test_cutting_and_padding_that_a_tokenizer_was_saved_with_are_left_out(
    tiny: Path, tmp_path: Path, texts: Path, text: Path
) -> None:
    from tokenizers import Tokenizer

    folder = Path(shutil.copytree(tiny, tmp_path / "cutting"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, packing in ((texts, "rows"), (text, "text")):
        settings = rows(packing=packing)
        assert np.array_equal(calibrate.make(folder, [file], settings).ids, calibrate.make(tiny, [file], settings).ids)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ strftime_now('%Y-%m-%d') }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]} for text in TEXTS
]


@pytest.fixture
def chatty(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = Path(shutil.copytree(tiny, tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize("field", [None, "messages"])
def test_a_conversation_is_rendered_by_the_models_template(chatty: Path, tmp_path: Path, field: str | None) -> None:
    made = calibrate.make(chatty, [json_lines(tmp_path / "chats.jsonl", CHATS)], rows(field=field))
    first = TEXTS[made.rows[0]]
    rendered = f"<user>{first}<assistant>{first[::-1]}2025-01-01"
    expected = encode(chatty, rendered, add_special_tokens=False)
    assert made.ids.reshape(-1)[: len(expected)].tolist() == expected


def test_a_conversation_without_a_template_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no chat template") as caught:
        calibrate.make(tiny, [json_lines(tmp_path / "chats.jsonl", CHATS)], rows())
    assert "--calib-field" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, "has no text in `messages`"),
        ({"text": 3}, "has no text in `text`"),
        ({"messages": ["hello"]}, "is no list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is no list of messages"),
        ([1], "is not a JSON object"),
    ],
)
def test_a_row_without_text_is_told_with_a_hint(chatty: Path, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(LlmoptError) as caught:
        calibrate.make(chatty, [json_lines(tmp_path / "bad.jsonl", [row])], rows())
    assert message in caught.value.message
    assert caught.value.hint


def test_a_template_that_refuses_a_row_is_told_as_such(chatty: Path, tmp_path: Path) -> None:
    (chatty / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LlmoptError, match="roles must alternate"):
        calibrate.make(chatty, [json_lines(tmp_path / "chats.jsonl", CHATS)], rows())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', "is not JSON"),
        ("a.jsonl", b"", "no rows in"),
        ("a.jsonl.gz", b"not packed", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(tiny: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmoptError, match=message):
        calibrate.make(tiny, [tmp_path / name], rows())


@pytest.mark.parametrize("packing", ["text", "rows"])
def test_too_few_tokens_are_told_with_how_many_there_are(tiny: Path, tmp_path: Path, packing: Any) -> None:
    file = json_lines(tmp_path / "few.jsonl", [{"text": "a few words"}] * 10)
    with pytest.raises(LlmoptError, match=r"calibration text is too short: \d+ tokens make \d+ windows of 64, not 8"):
        calibrate.make(tiny, [file], rows(samples=8, seq_len=64, packing=packing))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {}, 5),
        ({"eos_token_id": [7, 8]}, {}, 7),
        ({"text_config": {"eos_token_id": 9}}, {}, 9),
        ({"eos_token_id": None}, {"eos_token_id": [3]}, 3),
        ({}, {}, None),
    ],
)
def test_the_end_of_text_is_the_models_own(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], expected: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert calibrate.eos_token_id(tmp_path) == expected


def test_rows_without_a_token_between_are_an_event(tiny: Path, texts: Path) -> None:
    made = calibrate.make(tiny, [texts], rows(eos_token_id=None))
    assert "without a token between" in made.events[0]
    assert calibrate.make(tiny, [texts], rows()).events == ()


def test_the_folder_holds_ids_that_safetensors_reads(tiny: Path, texts: Path, tmp_path: Path) -> None:
    made = calibrate.make(tiny, [texts], rows())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outcome = calibrate.write(made, {"seed": 0, "samples": 4, "seq_len": 32}, tmp_path / name, silent)
    assert outcome.metrics == {"tokens": 128, "rows": len(made.rows)}
    stored = load_file(tmp_path / "a" / "calibration.safetensors")
    assert stored["input_ids"].dtype == np.int32
    assert np.array_equal(stored["input_ids"], made.ids)
    read = read_calibration(tmp_path / "a")
    assert read.dtype == np.int64
    assert np.array_equal(read, made.ids)
    assert calibrate.read_about(tmp_path / "a")["rows_used"] == list(made.rows)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_folder_that_is_no_set_is_refused(tiny: Path) -> None:
    with pytest.raises(LlmoptError, match=r"calibration.safetensors` is missing"):
        read_calibration(tiny)
    with pytest.raises(LlmoptError, match="is no calibration set"):
        calibrate.read_about(tiny)


def test_tokens_that_the_model_lacks_are_found_before_work(
    make_checkpoint: Callable[..., Path], tiny: Path, texts: Path, tmp_path: Path
) -> None:
    from llmopt import quantizers

    made = calibrate.make(tiny, [texts], rows())
    calibrate.write(made, {}, tmp_path, silent)
    small = make_checkpoint("llama", vocab_size=64)
    settings = quantizers.resolve({"method": "gptq", "group_size": 32, "samples": 4, "seq_len": 32})
    with pytest.raises(LlmoptError, match="the tokenizer has more tokens than the model"):
        quantizers.check(small, settings, tmp_path)
