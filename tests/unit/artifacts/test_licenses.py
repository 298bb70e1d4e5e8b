"""Licences: what cards and files state, and what artifacts inherit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmopt.artifacts import licenses
from llmopt.artifacts.licenses import Stated
from llmopt.artifacts.manifest import Action, FileEntry, Manifest

REPOSITORY = Path(__file__).resolve().parents[3]


def card(front: str) -> str:
    return f"---\n{front}\n---\n# A model\n\nlicense: not-this-one\n"


def expression(folder: Path) -> str | None:
    return licenses.join(stated.license for stated in licenses.of_folder(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (card("license: apache-2.0"), ("apache-2.0",)),
        (card("tags: [a]\nlicense: llama3.1\nmodel-index:\n- name: x\n  license: inner"), ("llama3.1",)),
        (card("license: other\nlicense_name: qwen-research\nlicense_link: LICENSE"), ("qwen-research",)),
        (card("license: other\nlicense_name: My Own Licence"), ("my-own-licence",)),
        (card("license: other"), ("other",)),
        (card("license: MIT"), ("mit",)),
        (card("license:\n- mit\n- apache-2.0"), ("mit", "apache-2.0")),
        (card("license: [mit, mit]"), ("mit",)),
        (card("license:"), ()),
        (card("license: 5"), ()),
        (card("license: [unclosed"), ()),
        (card("license_name: alone"), ()),
        (card("license: mit").replace("\n", "\r\n"), ("mit",)),
        ("\ufeff" + card("license: mit"), ("mit",)),
        ("# No front matter\nlicense: mit\n", ()),
        ("", ()),
    ],
)
def test_a_card_states_its_licence_in_its_front_matter(text: str, expected: tuple[str, ...]) -> None:
    assert licenses.of_card(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((REPOSITORY / "LICENSE").read_text(), "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2024 Somebody\n", "mit"),
        ("Copyright 2024\n\nPermission is hereby granted, free of charge, to any\nperson obtaining a copy of", "mit"),
        ("Modified MIT License\n\nCopyright", "modified-mit"),
        ("Copyright X.\nRedistribution and use in source and binary forms ... Neither the name of", "bsd-3-clause"),
        ("Copyright X.\nRedistribution and use in source and binary forms, with", "bsd-2-clause"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT\t\nLlama 2 Version Release Date: July 18, 2023", "llama2"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date", "llama3.1"),
        ("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta", "llama3.2"),
        ("LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "llama3.3"),
        ("Gemma Terms of Use\n\nLast modified: April 1, 2024", "gemma"),
        ("Tongyi Qianwen LICENSE AGREEMENT\n", "tongyi-qianwen"),
        ("Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date", "qwen-research"),
        ("# Mistral AI Research License\n\nIf You want to use a Mistral Model", "mrl"),
        ("DEEPSEEK LICENSE AGREEMENT\n\nVersion 1.0", "deepseek"),
        ("Attribution 4.0 International\n\n====\nCreative Commons Corporation", "cc-by-4.0"),
        ("Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International", "cc-by-nc-sa-4.0"),
        ("Attribution-ShareAlike 4.0 International", "cc-by-sa-4.0"),
        ("BigScience RAIL License v1.0\ndated May 19, 2022", "bigscience-bloom-rail-1.0"),
        ("BigScience OpenRAIL-M License", "bigscience-openrail-m"),
        ("CreativeML Open RAIL-M\ndated August 22, 2022", "creativeml-openrail-m"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007 ... GNU Affero General Public License", "gpl-3.0"),
        ("Our own terms. You may look at it.", None),
        ("", None),
    ],
)
def test_a_text_is_known_by_its_title(text: str, expected: str | None) -> None:
    assert licenses.of_text(text) == expected


def test_nothing_found_is_none(tmp_path: Path) -> None:
    assert expression(tmp_path) is None


def test_a_card_and_a_file_that_disagree_both_count(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card("license: mit"))
    (tmp_path / "LICENSE.txt").write_text("Apache License\nVersion 2.0, January 2004")
    assert expression(tmp_path) == "apache-2.0 AND mit"
    assert licenses.of_folder(tmp_path) == (Stated("mit", "README.md"), Stated("apache-2.0", "LICENSE.txt"))


def test_where_they_agree_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card("license: apache-2.0"))
    (tmp_path / "LICENCE").write_text("Apache License\nVersion 2.0, January 2004")
    assert expression(tmp_path) == "apache-2.0"


def test_other_is_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card("license: other"))
    (tmp_path / "LICENSE").write_text("DEEPSEEK LICENSE AGREEMENT")
    assert expression(tmp_path) == "deepseek"


def test_an_unknown_text_is_known_by_its_digest(tmp_path: Path) -> None:
    text = b"Our own terms."
    (tmp_path / "COPYING").write_bytes(text)
    assert expression(tmp_path) == f"LicenseRef-{hashlib.sha256(text).hexdigest()[:12]}"


def test_a_notice_of_names_alone_is_no_licence(tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_text("This product has parts by Somebody.")
    assert expression(tmp_path) is None


def test_a_file_that_is_no_text_and_a_folder_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").mkdir()
    (tmp_path / "LICENSE.pdf").write_bytes(b"%PDF\xff\xfe\x00")
    found = expression(tmp_path)
    assert found is not None
    assert found.startswith("LicenseRef-")


def test_joining_sorts_and_drops_what_is_twice() -> None:
    assert licenses.join(["mit", "llama3.1 AND apache-2.0", "MIT", "mit"]) == "apache-2.0 AND llama3.1 AND MIT AND mit"
    assert licenses.join([]) is None


def manifest(**inputs: str) -> Manifest:
    action = Action(op="x", op_version=1, inputs=inputs, settings={}, code="", deps={}, target={})
    return Manifest(kind="engine", files=(FileEntry("a", 1, "0" * 64),), action=action)


def test_what_is_made_inherits_from_all_that_is_in_it() -> None:
    made = manifest(model="x", model_license="llama3.1", adapter="y", adapter_license="mit AND apache-2.0")
    assert [stated.license for stated in licenses.of_manifest(made)] == ["apache-2.0", "llama3.1", "mit"]


def test_a_model_inherits_nothing_from_the_text_it_was_calibrated_on() -> None:
    assert licenses.of_manifest(manifest(calibration="x", calibration_license="cc-by-nc-4.0")) == ()


def test_a_calibration_set_inherits_from_its_data() -> None:
    assert licenses.of_manifest(manifest(data="x", data_license="odc-by")) == (Stated("odc-by", "its manifest"),)


@pytest.mark.parametrize(
    ("stated", "patterns", "expected"),
    [
        (["mit"], ["apache*"], None),
        (["mit"], ["MI?"], "mit"),
        (["Llama3.1"], ["gpl-*", "llama*"], "Llama3.1"),
        (["apache-2.0", "cc-by-nc-4.0"], ["*-nc-*"], "cc-by-nc-4.0"),
        (["LicenseRef-0123"], ["licenseref-*"], "LicenseRef-0123"),
        (["mit"], ["unknown"], None),
        (["unknown"], ["unknown"], "unknown"),
    ],
)
def test_a_pattern_is_a_glob_whatever_the_case(stated: list[str], patterns: list[str], expected: str | None) -> None:
    found = licenses.denied([Stated(license, "LICENSE") for license in stated], patterns)
    assert (found and found[0] and found[0].license) == expected


def test_none_stated_is_denied_as_unknown_only() -> None:
    assert licenses.denied([], ["*"]) is None
    assert licenses.denied([], ["mit", "UNKNOWN"]) == (None, "UNKNOWN")
