"""The demo model's corpus: text that every CPython carries, split by document.

A document is one topic of `pydoc_data.topics` (prose) or one source file of the standard library (code). The hash of
its name says where it belongs, so the split is the same on every CPython. From training sources, docstrings are also
told as short chats, so that the role tokens mean something.

The calibration and held-out texts are committed in the package, because the library differs between versions. What
they say is kept out of the training text whatever CPython runs: by document, and paragraph by paragraph, since topics
quote one another.

    python demo/corpus.py                  what there is, and whether it is the shipped model's corpus
    python demo/corpus.py --write-texts    write the two texts anew (then train anew: the model has seen the rest)
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TEXTS = REPO / "llmopt" / "profiles" / "text"
RECORD = REPO / "demo" / "model" / "TRAINING.json"

#: Folders and files that a distribution may leave out or make up itself, and the code pages' tables, which are no text.
EXCLUDED = frozenset({
    "__phello__", "_distutils_system_mod.py", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib",
    "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "sitecustomize.py", "test", "tests", "tkinter",
    "turtle.py", "turtledemo",
})  # fmt: skip
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")

#: Per cent of the documents of a source that go to the calibration text, and as many again to the held-out text.
HELD_PERCENT = {"topics": 16, "lib": 7}
#: What one document may add to a text, in characters, so that a text is of many documents.
EXCERPT_CHARS = {"topics": 25_000, "lib": 14_000}
TEXT_BYTES = 320_000  # of each text, at most
PARAGRAPH_CHARS = 80  # shorter paragraphs (`import sys`) may be anywhere
TOPIC_REPEATS = 2  # prose is a twentieth of the corpus; see it twice as often


@dataclass(frozen=True)
class Document:
    """A named text; the name starts with its source: `topics/`, `lib/` or `chat/`."""

    name: str
    text: str

    @property
    def source(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Corpus:
    """What to train on, and what never."""

    train: tuple[Document, ...]
    calibration: str
    heldout: str

    @property
    def sha256(self) -> str:
        """Of the training documents, names and order included."""
        digest = hashlib.sha256()
        for document in self.train:
            digest.update(f"{document.name}\0{document.text}\0".encode())
        return digest.hexdigest()


def normalised(text: str) -> str:
    """Line feeds only, no trailing blanks, no control characters, at most two blank lines in a row."""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = line.expandtabs(8)
        clean = (line if line.isprintable() else "".join(c for c in line if c.isprintable())).rstrip()
        if clean or lines[-2:] != ["", ""]:
            lines.append(clean)
    return "\n".join(lines).strip("\n") + "\n"


def name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """`heldout`, `calibration` or `train`: a function of the document's name alone."""
    share = HELD_PERCENT[name.partition("/")[0]]
    percent = name_hash(name) % 100
    return "heldout" if percent < share else "calibration" if percent < 2 * share else "train"


def documents() -> list[Document]:
    """Every document of the running CPython, by name."""
    from pydoc_data.topics import topics

    found = [Document(f"topics/{name}", normalised(text)) for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if any(part in EXCLUDED or part.startswith(EXCLUDED_PREFIXES) for part in parts):
            continue
        try:
            found.append(Document("lib/" + "/".join(parts), normalised(path.read_bytes().decode("utf-8"))))
        except UnicodeDecodeError:
            continue  # a few old sources are in another encoding
    return sorted((d for d in found if len(d.text) >= 200), key=lambda document: document.name)


def paragraphs(text: str) -> list[str]:
    return text.strip("\n").split("\n\n")


def fingerprints(text: str) -> Iterator[str]:
    """The long paragraphs of a text without their indentation, as which they are compared."""
    for paragraph in paragraphs(text):
        words = " ".join(paragraph.split())
        if len(words) >= PARAGRAPH_CHARS:
            yield words


def without(document: Document, unwanted: set[str]) -> Document:
    """The document less the paragraphs that `unwanted` fingerprints name."""
    kept = [p for p in paragraphs(document.text) if " ".join(p.split()) not in unwanted]
    return Document(document.name, "\n\n".join(kept) + "\n")


def excerpt(document: Document) -> str:
    """The head of a document, whole paragraphs only."""
    chars = 0
    kept: list[str] = []
    for paragraph in paragraphs(document.text):
        chars += len(paragraph) + 2
        if kept and chars > EXCERPT_CHARS[document.source]:
            break
        kept.append(paragraph)
    return "\n\n".join(kept).strip("\n") + "\n"


def assemble(candidates: Iterable[Document], unwanted: set[str]) -> str:
    """One text of many documents' heads in the order of their names' hashes, prose among code."""
    parts: list[str] = []
    size = 0
    for document in sorted(candidates, key=lambda d: name_hash("order " + d.name)):
        part = excerpt(without(document, unwanted))
        if len(part) < 200:
            continue
        size += len(part.encode()) + 2
        if size > TEXT_BYTES:
            break
        parts.append(part)
    return "\n\n".join(parts)


def make_texts(found: list[Document]) -> tuple[str, str]:
    """(calibration, held-out) text, no long paragraph in both."""
    heldout = assemble([d for d in found if split_of(d.name) == "heldout"], set())
    calibration = assemble([d for d in found if split_of(d.name) == "calibration"], set(fingerprints(heldout)))
    return calibration, heldout


def chat(document: Document) -> Document | None:
    """A source file's docstrings as questions and answers, in the form of the model's chat template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in a source are no concern of ours
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            return None
    module = document.name.removeprefix("lib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    turns: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        answer = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if not 40 <= len(answer) <= 1200:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        system = "<|system|>\nYou explain Python.\n" if name_hash(node.name) % 4 == 0 else ""
        turns.append(f"{system}<|user|>\nWhat is the {kind} {node.name} of {module}?\n<|assistant|>\n{answer}")
    return Document(document.name.replace("lib/", "chat/", 1), "<|endoftext|>".join(turns)) if turns else None


def build() -> Corpus:
    """The corpus of the running CPython beside the committed texts."""
    calibration = (TEXTS / "calibration.txt").read_text("utf-8")
    heldout = (TEXTS / "heldout.txt").read_text("utf-8")
    unwanted = {*fingerprints(calibration), *fingerprints(heldout)}
    train: list[Document] = []
    for document in documents():
        if split_of(document.name) != "train":
            continue
        clean = without(document, unwanted)
        train += [clean] * (TOPIC_REPEATS if document.source == "topics" else 1)
        answers = chat(clean) if document.source == "lib" else None
        train += [without(answers, unwanted)] if answers else []
    return Corpus(tuple(train), calibration, heldout)


def difference(corpus: Corpus, record: Path = RECORD) -> str | None:
    """A sentence if the shipped model was trained on other text than this, else None."""
    if not record.is_file():
        return None
    shipped = json.loads(record.read_text("utf-8"))
    if shipped["corpus_sha256"] == corpus.sha256:
        return None
    return (
        f"CPython {platform.python_version()} gives another corpus ({corpus.sha256[:12]}) than CPython "
        f"{shipped['cpython']} gave the shipped model ({shipped['corpus_sha256'][:12]}): the weights will differ"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo model's corpus from the running CPython.")
    parser.add_argument("--write-texts", action="store_true", help="write the calibration and held-out texts anew")
    if parser.parse_args().write_texts:
        TEXTS.mkdir(parents=True, exist_ok=True)
        for name, text in zip(("calibration.txt", "heldout.txt"), make_texts(documents()), strict=True):
            (TEXTS / name).write_text(text, "utf-8")
    corpus = build()
    for source in ("topics", "lib", "chat"):
        chosen = [d for d in corpus.train if d.source == source]
        print(f"{source}: {len(chosen)} documents, {sum(len(d.text) for d in chosen):,} characters")
    print(f"calibration: {len(corpus.calibration):,} characters; held-out: {len(corpus.heldout):,}")
    print(f"corpus sha256 {corpus.sha256} from CPython {platform.python_version()}")
    if RECORD.is_file():
        print(difference(corpus) or "This is the corpus of the shipped model.")


if __name__ == "__main__":
    main()
