"""Quantize with llmcompressor: the job's recipe on the job's token ids. Runs in llmcompressor's own venv.

python run_llmcompressor.py job.json
{"model": folder, "ids": file.npy [N, T], "recipe": [[modifier, arguments], ...], "batch": windows at once,
 "out": folder, "figures": "figures.json"}
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
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():
        # Its AWQ pins memory for copies to an accelerator and fails where there is none; nothing is to be copied.
        IntermediatesCache.pin_memory = lambda *arguments, **keywords: None
    known = {cls.__name__: cls for cls in (GPTQModifier, QuantizationModifier, AWQModifier, SmoothQuantModifier)}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    figures = measuring.Figures()
    with figures.core():
        ids = np.load(job["ids"])
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=[known[name](**arguments) for name, arguments in job["recipe"]],
            num_calibration_samples=len(rows),
            max_seq_length=ids.shape[1],
            batch_size=job["batch"],
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(job["out"], save_compressed=True)
    figures.write(Path(job["figures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
