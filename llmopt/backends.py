"""Optional backends: imported when first needed and without telemetry, or refused with what installs them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from llmopt.errors import BackendMissingError

_TELEMETRY = "openvino_telemetry"


def require(module: str, *, extra: str) -> None:
    """BackendMissingError unless the top-level `module` is installed. Does not import it."""
    if importlib.util.find_spec(module) is None:
        raise BackendMissingError(f"`{module}` is not installed", hint=f"pip install 'llmopt[{extra}]'")


def load(module: str, *, extra: str = "openvino") -> ModuleType:
    """Import `module`, which comes with the extra `extra`; raises BackendMissingError when it is not installed.

    `import openvino` reports to a server and writes to the home folder unless `openvino_telemetry` cannot be imported,
    in which case OpenVINO falls back to a stub of its own. So for the time of the import it cannot.
    """
    hide = _TELEMETRY not in sys.modules
    if hide:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendMissingError(
            f"`{module}` cannot be imported: {error}", hint=f"pip install 'llmopt[{extra}]'"
        ) from error
    finally:
        if hide:
            sys.modules.pop(_TELEMETRY, None)
