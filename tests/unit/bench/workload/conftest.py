from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", params=["byte_level", "metaspace"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT's way of cutting words, with a token before a text; and Llama 2's, with one at its end too."""
    if request.param == "byte_level":
        file: Path = request.getfixturevalue("tokenizer_file")
        return file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    from llmopt.profiles import HELDOUT_TEXT

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=sorted(set(text)), show_progress=False
    )
    tokenizer.train_from_iterator(text[:60_000].splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file
