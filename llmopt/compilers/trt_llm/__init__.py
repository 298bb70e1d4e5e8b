"""TensorRT-LLM in stages: plan and prepare on any machine, build where the GPU is.

Engine mode writes the unified checkpoint that `trtllm-build` takes (versions up to 1.2.1), bundle mode a checkpoint in
ModelOpt's Hugging Face format that `trtllm-serve` loads as it is (1.2 and later). TensorRT-LLM is never imported here.
"""
