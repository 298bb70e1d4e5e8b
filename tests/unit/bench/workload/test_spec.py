from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from llmopt.bench.workload.spec import Length, Workload, draw_tokens, resolve, shipped
from llmopt.errors import LlmoptError, SettingsError
from llmopt.profiles.settings import to_json


def drawn(length: Length, count: int = 4000) -> list[float]:
    rng = random.Random(0)
    return sorted(length.draw(rng) for _ in range(count))


def test_nothing_given_is_fixed_prompts_that_share_nothing() -> None:
    found = resolve()
    assert (found.prompt_tokens, found.output_tokens, found.prefix_tokens, found.turns) == (128, 64, 0, 1)


@pytest.mark.parametrize("name", ["agent", "chat", "code", "rag", "summarise"])
def test_what_ships_resolves_and_says_what_it_is(name: str) -> None:
    assert name in shipped()
    found = resolve(name)
    assert found.description
    assert found.most_tokens is not None
    assert found.most_tokens <= 65_536


def test_chat_and_agent_have_several_turns_and_a_shared_beginning() -> None:
    for name in ("chat", "agent"):
        found = resolve(name)
        assert isinstance(found.turns, Length)
        assert found.prefix_tokens
        assert found.think_s


def test_what_is_given_wins_over_the_profile() -> None:
    found = resolve("chat", prompt_tokens=7, turns=3, think_s=0.0)
    assert (found.prompt_tokens, found.turns, found.think_s) == (7, 3, 0.0)
    assert found.output_tokens == resolve("chat").output_tokens


def test_the_json_of_a_workload_is_the_same_workload(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    for reference in ({"prompt_tokens": {"min": 10, "max": 20}, "turns": 2}, {"file": str(tmp_path / "rows.jsonl")}):
        found = resolve(reference)
        assert resolve(to_json(found)) == found


def test_a_yaml_of_ones_own_names_its_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "own.yaml").write_text("file: rows.jsonl\noutput_tokens: 5\n")
    assert resolve(str(tmp_path / "own.yaml")).file == str((tmp_path / "rows.jsonl").resolve())
    assert resolve(str(tmp_path / "rows.jsonl")).output_tokens is None


def test_a_misspelt_setting_is_an_error_with_file_line_and_hint(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("turns: 2\npromt_tokens: 12\n")
    with pytest.raises(SettingsError, match=r"own.yaml:2: .*`promt_tokens`") as caught:
        resolve(str(file))
    assert caught.value.hint == "did you mean `prompt_tokens`?"


def test_a_distribution_that_does_not_fit_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("turns: 2\noutput_tokens: {median: 12, p90: 3}\n")
    with pytest.raises(SettingsError, match=r"own.yaml:2: "):
        resolve(str(file))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("chatt", "no workload is named `chatt`"),
        ("notes.txt", "is not a workload"),
        ("gone.yaml", "no workload file"),
        ("gone.jsonl", "no workload file"),
        ({"file": "gone.parquet"}, "no data of a workload"),
        ({"prompt_tokens": 0}, "`prompt_tokens` cannot be `0`"),
        ({"turns": 0}, "`turns` cannot be `0`"),
        ({"think_s": -1.0}, "`think_s` cannot be"),
        ({"prompt_tokens": {"mean": 3}}, "a distribution cannot be made of `mean`"),
        ({"prompt_tokens": {"median": 3, "p90": 4, "sd": 1}}, "a distribution cannot be made of"),
        ({"prompt_tokens": {"min": 3}}, "a distribution cannot be made of nothing"),
        ({"prompt_tokens": {"min": 9, "max": 3}}, "cannot have max"),
        ({"prompt_tokens": "many"}, "`workload.prompt_tokens`"),
    ],
)
def test_what_is_no_workload_is_an_error_with_a_hint(reference: Any, message: str) -> None:
    with pytest.raises(LlmoptError, match=message) as caught:
        resolve(reference)
    assert caught.value.hint


def test_lengths_do_not_go_with_a_file_that_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(SettingsError, match=r"`prompt_tokens` does not go with `rows.jsonl`"):
        resolve(str(tmp_path / "rows.jsonl"), prompt_tokens=5)


def test_a_log_normal_has_the_quantiles_it_is_given() -> None:
    values = drawn(Length(median=100, p90=400))
    assert median(values) == pytest.approx(100, rel=0.08)
    assert values[int(0.9 * len(values))] == pytest.approx(400, rel=0.1)


def test_a_normal_has_the_mean_it_is_given() -> None:
    values = drawn(Length(mean=100, sd=10))
    assert sum(values) / len(values) == pytest.approx(100, rel=0.01)


def test_bounds_without_a_shape_are_drawn_from_evenly() -> None:
    values = drawn(Length(min=10, max=20))
    assert median(values) == pytest.approx(15, abs=0.3)


@pytest.mark.parametrize("shape", [{"median": 100, "p90": 900}, {"mean": 100, "sd": 90}, {}])
def test_nothing_lies_outside_the_bounds(shape: dict[str, float]) -> None:
    values = drawn(Length(**shape, min=60, max=130))
    assert min(values) >= 60
    assert max(values) <= 130


def test_drawn_tokens_are_whole_and_at_least_one() -> None:
    rng = random.Random(0)
    found = [draw_tokens(Length(mean=1, sd=5), rng) for _ in range(100)]
    assert all(isinstance(tokens, int) and tokens >= 1 for tokens in found)


def test_the_longest_conversation_is_known_where_everything_is_bounded() -> None:
    found = resolve(
        {"prefix_tokens": 10, "prompt_tokens": 20, "next_tokens": 5, "turns": {"min": 1, "max": 3}, "output_tokens": 7}
    )
    assert found.most_tokens == 10 + 20 + 2 * 5 + 3 * 7
    assert resolve({"prompt_tokens": {"mean": 20, "sd": 2}}).most_tokens is None


def test_a_workload_is_checked_when_it_is_made_by_hand_too() -> None:
    with pytest.raises(SettingsError, match="`prefixes`"):
        Workload(prefixes=0)
