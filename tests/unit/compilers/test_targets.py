"""Settings of the targets, and what naming one imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmopt import compilers
from llmopt.errors import SettingsError
from llmopt.profiles.settings import to_json


def test_openvino_is_the_default_target_and_every_default_is_spelled_out() -> None:
    assert to_json(compilers.resolve({})) == {
        "target": "openvino",
        "aot": True,
        "lm_head": "auto",
        "activation_group": None,
        "precision": "auto",
        "kv_cache": "auto",
    }


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"target": "openvin"}, "unknown target `openvin`", "did you mean `openvino`?"),
        ({"lm_haed": "int8"}, "`compile` has no setting `lm_haed`", "did you mean `lm_head`?"),
        ({"lm_head": "int4"}, "`compile.lm_head` cannot be `int4`", "`int8`"),
        ({"activation_group": 100}, "`compile.activation_group` cannot be `100`", "`128`"),
        ({"activation_group": -1}, "`compile.activation_group` cannot be `-1`", "`128`"),
        ({"aot": "yes"}, "`compile.aot` must be true or false", "`true`"),
    ],
)
def test_a_setting_that_cannot_be_used_is_an_error(settings: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        compilers.resolve(settings)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_every_target_can_be_resolved() -> None:
    for name in compilers.TARGETS:
        assert compilers.resolve({"target": name}).target == name
        assert all(
            isinstance(distribution, str) for distribution in compilers.deps(compilers.resolve({"target": name}))
        )


def test_checking_a_model_loads_no_backend(make_checkpoint: Any) -> None:
    script = (
        "import sys, pathlib\n"
        "from llmopt import compilers\n"
        "target = compilers.resolve({})\n"
        "compilers.check(pathlib.Path(sys.argv[1]), target)\n"
        "compilers.deps(target)\n"
        "heavy = {'torch', 'transformers', 'openvino', 'openvino_tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, make_checkpoint("llama")], check=True)


def test_backends_are_imported_without_telemetry(tmp_path: Path) -> None:
    script = (
        "import sys, threading\n"
        "from llmopt.backends import load\n"
        "for name in ('openvino', 'openvino_tokenizers', 'openvino_genai'):\n"
        "    load(name)\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "assert threading.active_count() == 1\n"
        "import openvino_telemetry\n"  # whoever wants it still finds it
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"HOME": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_a_target_cannot_compile_is_refused_before_a_backend_is_loaded(make_checkpoint: Any) -> None:
    script = (
        "import sys, pathlib\n"
        "from llmopt import compilers\n"
        "from llmopt.errors import LlmoptError\n"
        "try:\n"
        "    compilers.check(pathlib.Path(sys.argv[1]), compilers.resolve({}))\n"
        "except LlmoptError as error:\n"
        "    assert '`phi3`' in error.message and '`qwen3`' in error.hint, error\n"
        "else:\n"
        "    raise SystemExit('not refused')\n"
        "heavy = {'torch', 'transformers', 'openvino', 'openvino_tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, make_checkpoint("phi3")], check=True)
