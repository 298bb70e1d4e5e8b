"""Quantize with GPTQModel: the job's settings on the job's token ids. Runs in GPTQModel's own venv.

python run_gptqmodel.py job.json
{"model": folder, "ids": file.npy [N, T], "config": {QuantizeConfig's arguments}, "batch": windows at once,
 "out": folder, "figures": "figures.json"}
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with its own count it fails on machines of few cores

import measuring


def main() -> int:
    job = measuring.start()
    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(1)
    model = GPTQModel.load(job["model"], QuantizeConfig(**job["config"]), device="cpu")
    figures = measuring.Figures()
    with figures.core():
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(job["ids"])]
        model.quantize(rows, batch_size=job["batch"])
    model.save(job["out"])
    figures.write(Path(job["figures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
