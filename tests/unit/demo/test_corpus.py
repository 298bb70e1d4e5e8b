"""demo/corpus.py and the two texts that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def built(corpus: ModuleType):
    return corpus.build()


@pytest.fixture(params=["calibration.txt", "heldout.txt"])
def text(request: pytest.FixtureRequest, text_folder: Path) -> str:
    return (text_folder / request.param).read_text("utf-8")


def skip_unless_same_cpython(corpus: ModuleType, built) -> None:
    if message := corpus.difference(built):
        pytest.skip(message)


def test_each_text_fills_140_windows_of_512_tokens(text: str, model_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode(text).ids
    assert len(tokens) >= 140 * 512


def test_each_text_is_small_and_plain(text: str) -> None:
    assert len(text.encode()) <= 450_000
    assert all(c == "\n" or c.isprintable() for c in text)
    assert "<|" not in text


def test_each_text_mixes_prose_and_code(text: str, corpus: ModuleType, built) -> None:
    skip_unless_same_cpython(corpus, built)
    used = [d for d in corpus.documents() if corpus.excerpt(d)[:150] in text]
    chars = {s: sum(len(corpus.excerpt(d)) for d in used if d.source == s) for s in ("topics", "lib")}
    assert min(chars.values()) >= 0.15 * sum(chars.values())


def test_no_paragraph_is_in_both_texts(corpus: ModuleType, text_folder: Path) -> None:
    calibration, heldout = ((text_folder / name).read_text("utf-8") for name in ("calibration.txt", "heldout.txt"))
    assert not set(corpus.fingerprints(calibration)) & set(corpus.fingerprints(heldout))


def test_no_paragraph_of_the_texts_is_trained_on(corpus: ModuleType, built) -> None:
    held = {*corpus.fingerprints(built.calibration), *corpus.fingerprints(built.heldout)}
    assert len(held) > 500
    assert not held & {words for document in built.train for words in corpus.fingerprints(document.text)}


def test_no_document_of_the_texts_is_trained_on(corpus: ModuleType, built) -> None:
    trained = {d.name.replace("chat/", "lib/") for d in built.train}
    assert all(corpus.split_of(name) == "train" for name in trained)


def test_the_texts_are_made_from_the_documents_of_this_cpython(corpus: ModuleType, built) -> None:
    skip_unless_same_cpython(corpus, built)
    assert corpus.make_texts(corpus.documents()) == (built.calibration, built.heldout)


def test_a_corpus_that_is_not_the_shipped_models_is_named_as_such(corpus: ModuleType, built, tmp_path: Path) -> None:
    record = tmp_path / "TRAINING.json"
    record.write_text(json.dumps({"corpus_sha256": "0" * 64, "cpython": "3.99.1"}))
    assert "than CPython 3.99.1 gave the shipped model" in corpus.difference(built, record)
    record.write_text(json.dumps({"corpus_sha256": built.sha256, "cpython": "3.99.1"}))
    assert corpus.difference(built, record) is None


def test_a_document_less_a_paragraph_keeps_the_rest(corpus: ModuleType) -> None:
    long = "words " * 20
    document = corpus.Document("lib/a.py", f"import sys\n\n    {long}\n\nend\n")
    assert corpus.without(document, set(corpus.fingerprints(long))).text == "import sys\n\nend\n"


def test_docstrings_become_questions_and_answers(corpus: ModuleType) -> None:
    answer = "Return the sum of two numbers, whatever they are."
    source = f'def add(a, b):\n    """{answer}"""\n\ndef _hidden():\n    """{answer}"""\n'
    said = corpus.chat(corpus.Document("lib/pkg/__init__.py", source))
    assert said.name == "chat/pkg/__init__.py"
    assert said.text.endswith(f"<|user|>\nWhat is the function add of pkg?\n<|assistant|>\n{answer}")
    assert "_hidden" not in said.text
