"""A setting that is `Json` takes what YAML has, however deep, and comes back from a manifest as it went in."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError
from llmopt.profiles.settings import build, to_json


@dataclass(frozen=True, kw_only=True)
class Flags:
    flags: Mapping[str, Json] = field(default_factory=dict)


def test_objects_and_lists_are_taken_and_read_back() -> None:
    values: dict[str, Json] = {"b": {"y": [1, {"z": None}], "x": 0.5}, "a": [True, "text"], "c": None}
    made = build(Flags, {"flags": values}, where="section")
    assert made.flags == values
    assert build(Flags, json.loads(json.dumps(to_json(made))), where="section") == made


def test_a_date_that_yaml_read_is_an_error_with_its_place() -> None:
    with pytest.raises(SettingsError, match=r"`section.flags.a.b` cannot be `2026-01-01`") as caught:
        build(Flags, {"flags": {"a": {"b": datetime.date(2026, 1, 1)}}}, where="section")
    assert caught.value.hint == "quote it if it is text"
