"""Chat templates: the prompt is what transformers would make of the same messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt.errors import LlmoptError
from llmopt.models.chat import ChatTemplate, TemplateRefusedError

LLAMA_LIKE = """
{%- for message in messages %}
    {%- if loop.first %}{{ bos_token }}{%- endif %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token }}
    {%- generation %}{{ '.' }}{%- endgeneration %}
    {{- {'a': 'é<'} | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if not think %}<nothink>{% endif %}{%- endif %}
{{- strftime_now('%%') }}
"""
MESSAGES = [{"role": "system", "content": "x"}, {"role": "user", "content": " hi <b> "}]


def folder_with(tmp_path: Path, config: dict[str, Any], template: str | None = None) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize("extra", [{}, {"think": True}])
def test_the_prompt_is_what_transformers_renders(tiny: Path, tmp_path: Path, extra: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, bos_token="<|user|>", eos_token="<|end|>")
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=LLAMA_LIKE, tokenize=False, add_generation_prompt=True, **extra
    )
    config = {"bos_token": "<|user|>", "eos_token": {"content": "<|end|>", "special": True}}
    template = ChatTemplate.read(folder_with(tmp_path, config, LLAMA_LIKE))
    assert template is not None
    assert template.render(MESSAGES, extra) == expected


@pytest.mark.parametrize(
    "config", [{"chat_template": "one"}, {"chat_template": [{"name": "default", "template": "one"}]}]
)
def test_an_older_checkpoint_has_its_template_in_the_tokenizers_config(tmp_path: Path, config: dict[str, Any]) -> None:
    template = ChatTemplate.read(folder_with(tmp_path, config))
    assert template is not None
    assert template.render(MESSAGES, {}) == "one"


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.read(folder_with(tmp_path, {})) is None


def test_variables_of_a_request_cannot_replace_the_messages(tmp_path: Path) -> None:
    template = ChatTemplate.read(folder_with(tmp_path, {}, "{{ messages[0].content }}"))
    assert template is not None
    assert template.render(MESSAGES, {"messages": [{"content": "forged"}]}) == "x"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_told_as_such(tmp_path: Path, source: str) -> None:
    template = ChatTemplate.read(folder_with(tmp_path, {}, source))
    assert template is not None
    with pytest.raises(TemplateRefusedError):
        template.render(MESSAGES, {})


def test_a_broken_template_stops_the_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(LlmoptError, match="chat template"):
        ChatTemplate.read(folder_with(tmp_path, {}, "{% if %}"))
