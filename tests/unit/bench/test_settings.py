from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmopt.bench import BenchSettings, Subject, check, resolve
from llmopt.errors import Exit, LlmoptError, SettingsError


def test_defaults() -> None:
    found = resolve({})
    assert [load.label for load in found.loads(timed=False)] == ["c1", "c4"]
    assert (found.workload.prompt_tokens, found.workload.output_tokens, found.warmup, found.rounds) == (128, 64, 2, 1)


def test_one_concurrency_needs_no_list() -> None:
    assert resolve({"concurrency": 16}).concurrency == (16,)


def test_a_misspelt_setting_is_an_error() -> None:
    with pytest.raises(SettingsError, match="`bench` has no setting `concurency`") as caught:
        resolve({"concurency": 4})
    assert caught.value.hint == "did you mean `concurrency`?"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rate": [0.0]}, "`rate` cannot be `0`"),
        ({"rate": 2, "concurrency": 2}, "two kinds of load"),
        ({"sweep": "rate", "concurrency": 2}, "`sweep` finds its levels itself"),
        ({"sweep": "rate", "rounds": 2}, "do not go together"),
        ({"arrivals": "constant"}, "`arrivals` changes nothing here"),
        ({"rate": 1, "burstiness": 0.5}, "`burstiness` changes nothing here"),
        ({"in_flight": 4}, "`in_flight` changes nothing here"),
        ({"rate": 1, "speed": 2.0}, "`speed` changes nothing here"),
        ({"rounds": 2, "max_rounds": 8}, "`max_rounds` changes nothing here"),
        ({"slo": ["ttft_ms_p98<=1"]}, "reports have no `p98`"),
        ({"gate_metrics": ["ttft"]}, "cannot be compared"),
        ({"margin": "5 percent"}, "`margin` cannot be `5 percent`"),
        ({"headers": ["authorization: secret"]}, "would end up in the report"),
        ({"headers": ["x-tenant: $NOT_SET_ANYWHERE"]}, "the environment has no `NOT_SET_ANYWHERE`"),
        ({"headers": ["tenant"]}, "is not a header"),
        ({"in_process": True, "rate": 1}, "closed loop only"),
        ({"concurrency": [0]}, "`concurrency` cannot be `0`"),
        ({"concurrency": [2, 2]}, "`concurrency` cannot be `2, 2`"),
        ({"requests": 0}, "`requests` cannot be `0`"),
        ({"requests": 3, "concurrency": [1, 4]}, "`requests` of 3 cannot keep 4 streams busy"),
        ({"duration_s": 0}, "`duration_s` cannot be"),
        ({"timeout_s": -1}, "`timeout_s` cannot be"),
        ({"duration_s": float("nan")}, "`duration_s` cannot be"),
        ({"rounds": 0}, "`rounds` cannot be `0`"),
        ({"warmup": -1}, "`warmup` cannot be `-1`"),
        ({"output_tokens": 0}, "`output_tokens` cannot be `0`"),
        ({"endpoint": "chats"}, "cannot be `chats`"),
    ],
)
def test_a_value_out_of_range_is_an_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        resolve(settings)
    assert caught.value.code is Exit.USAGE


def test_requests_grow_with_the_streams_unless_given_or_timed() -> None:
    plain = resolve({})
    assert [plain.requests_at(plain.at_streams(streams)) for streams in (1, 16)] == [8, 64]
    assert [plain.requests_at(plain.at_rate(rate)) for rate in (0.1, 10)] == [16, 200]
    assert resolve({"requests": 20}).requests_at(plain.at_streams(4)) == 20
    assert resolve({"duration_s": 1}).requests_at(plain.at_streams(4)) is None


def checked(**subject: Any) -> None:
    check({"candidate": Subject(name="candidate", **subject)}, BenchSettings())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "is not the URL of a server"),
        ("ftp://host", "is not the URL of a server"),
        ("http://", "is not the URL of a server"),
        ("http://host:99999", "is not the URL of a server"),
        ("http://[::1", "is not the URL of a server"),
        ("http://host/v1?api-version=1", "has more than a server's address"),
        ("http://host/a b", "has more than a server's address"),
    ],
)
def test_an_address_that_is_none_is_an_error(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        checked(url=url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        checked(url="http://me:secret@host")
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_no_subject_is_an_error() -> None:
    with pytest.raises(SettingsError, match="nothing to bench"):
        check({}, BenchSettings())


def test_a_url_and_an_engine_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="both a URL and an engine"):
        checked(url="http://host", engine=tmp_path)


def test_an_engine_that_is_still_to_be_made_passes() -> None:
    checked()


def test_a_missing_engine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no engine folder"):
        checked(engine=tmp_path / "none")
    with pytest.raises(LlmoptError, match=r"has no `engine\.json`"):
        checked(engine=tmp_path)
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(LlmoptError, match="is not JSON"):
        checked(engine=tmp_path)


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="no tokenizer at"):
        checked(url="http://host", tokenizer=tmp_path)


def test_lengths_beyond_the_engine_s_context_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"max_context_tokens": 1024}')
    subjects = {"candidate": Subject(name="candidate", engine=tmp_path)}
    check(subjects, resolve({"prompt_tokens": 960}))
    with pytest.raises(SettingsError, match="of 1025 tokens in all do not fit into the 1024 tokens"):
        check(subjects, resolve({"prompt_tokens": 961}))


def test_the_tokenizer_is_the_given_one_or_else_the_engine_s(tmp_path: Path) -> None:
    engine, other = tmp_path / "engine", tmp_path / "other"
    for folder in (engine, other):
        folder.mkdir()
        (folder / "tokenizer.json").touch()
    assert Subject(name="a", engine=engine).tokenizer_file == engine / "tokenizer.json"
    assert Subject(name="a", engine=engine, tokenizer=other).tokenizer_file == other / "tokenizer.json"
    assert Subject(name="a", url="http://host").tokenizer_file is None
