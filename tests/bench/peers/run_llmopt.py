"""Run `llmopt` in this process with the job's arguments, and time what `quantize` itself does in it.

python run_llmopt.py job.json      {"arguments": ["quantize", ...], "figures": "figures.json"}
"""

from __future__ import annotations

import sys
from pathlib import Path

import measuring


def main() -> int:
    job = measuring.start()
    # Imported beforehand, as the peers' runners do: imports are not the core.
    import torch  # noqa: F401

    from llmopt import quantizers
    from llmopt.cli.app import main as llmopt
    from llmopt.quantizers import driver  # noqa: F401

    figures = measuring.Figures()
    quantizers.quantize = figures.around(quantizers.quantize)
    sys.argv = ["llmopt", *job["arguments"]]
    try:
        llmopt()
    except SystemExit as ended:
        if ended.code:
            raise
    figures.write(Path(job["figures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
