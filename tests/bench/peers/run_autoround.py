"""Quantize with auto-round: the job's settings on the job's token ids. Runs in auto-round's own venv.

python run_autoround.py job.json
{"model": folder, "ids": file.npy [N, T], "config": {AutoRound's arguments}, "out": folder,
 "figures": "figures.json"}
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import measuring


def main() -> int:
    job = measuring.start()
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    figures = measuring.Figures()
    with figures.core():
        ids = torch.from_numpy(np.load(job["ids"]))
        batches = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=8)
        rounding = AutoRound(
            model,
            tokenizer,
            dataset=batches,
            nsamples=len(ids),
            seqlen=ids.shape[1],
            device_map="cpu",
            enable_torch_compile=False,
            **job["config"],
        )
        rounding.quantize()
    rounding.save_quantized(job["out"], format="auto_gptq")
    figures.write(Path(job["figures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
