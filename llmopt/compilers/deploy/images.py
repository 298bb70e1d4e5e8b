"""Container images with what they hold, as data; a tag that no source names is not in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.compilers.deploy.base import Deployment
from llmopt.errors import SettingsError

#: AWS's account for its containers in most regions (deep-learning-containers, docs/reference/region_availability.md).
LMI_ACCOUNT = "763104351884"


@dataclass(frozen=True, slots=True)
class Image:
    """What to pull, and the runtime's version in it as its source gives it. LMI's are without their registry."""

    tag: str
    holds: str


#: LMI's `djl-inference`, by the version of TensorRT-LLM. It is the last one; its tag says 0.21.0, and djl-serving's
#: release notes and Dockerfile for 0.33.0 say that 0.21.0rc1 lies in it, whose engines 0.21.0 does not load.
LMI_TENSORRT_LLM: Mapping[str, Image] = {
    "0.21.0rc1": Image("djl-inference:0.33.0-tensorrtllm0.21.0-cu128", "TensorRT-LLM 0.21.0rc1"),
}
#: The same by the version of vLLM, oldest first: aws/deep-learning-containers, docs/src/data/djl-inference/*.yml.
LMI_VLLM: Mapping[str, Image] = {
    "0.15.1": Image("djl-inference:0.36.0-lmi20.0.0-cu128", "vLLM 0.15.1"),
    "0.16.0": Image("djl-inference:0.36.0-lmi21.0.0-cu129", "vLLM 0.16.0"),
    "0.17.0": Image("djl-inference:0.36.0-lmi22.0.0-cu129", "vLLM 0.17.0"),
    "0.18.0": Image("djl-inference:0.36.0-lmi23.0.0-cu129", "vLLM 0.18.0"),
    "0.19.0": Image("djl-inference:0.36.0-lmi24.0.0-cu129", "vLLM 0.19.0"),
    "0.20.1": Image("djl-inference:0.36.0-lmi25.0.0-cu130", "vLLM 0.20.1"),
    "0.22.1": Image("djl-inference:0.36.0-lmi26.0.0-cu130", "vLLM 0.22.1"),
    "0.23.1": Image("djl-inference:0.36.0-lmi27.0.0-cu130", "vLLM 0.23.1"),
    "0.26.0": Image("djl-inference:0.36.0-lmi28.0.0-cu130", "vLLM 0.26.0"),
    "0.28.0": Image("djl-inference:0.38.0-lmi29.0.0-cu130", "vLLM 0.28.0"),
}
#: nvcr.io/nvidia/tritonserver, by the version of TensorRT-LLM: triton-inference-server/server,
#: docs/introduction/compatibility.md, the newest row of each version.
TRITON: Mapping[str, Image] = {
    "0.21.0": Image("nvcr.io/nvidia/tritonserver:25.08-trtllm-python-py3", "TensorRT-LLM 0.21.0"),
    "1.0.0": Image("nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3", "TensorRT-LLM 1.0.0"),
    "1.1.0": Image("nvcr.io/nvidia/tritonserver:26.02-trtllm-python-py3", "TensorRT-LLM 1.1.0"),
    "1.2.0": Image("nvcr.io/nvidia/tritonserver:26.03-trtllm-python-py3", "TensorRT-LLM 1.2.0"),
    "1.2.1": Image("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", "TensorRT-LLM 1.2.1"),
}
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
#: Fetches an artifact from S3. AWS CLI's documentation, "Run the AWS CLI from the official images", a tag a release.
AWS_CLI = "amazon/aws-cli:2.27.9"


def lmi(deployment: Deployment) -> Image:
    """LMI's container for the deployment; for vLLM the newest where none holds the version.

    Raises SettingsError for a TensorRT-LLM that no image of LMI holds, unless the user names one.
    """
    if deployment.image is not None:
        return _own(deployment.image)
    if deployment.runtime == "vllm":
        newest = [*LMI_VLLM.values()][-1]
        other = Image(newest.tag, f"{newest.holds}, the newest; this was prepared for {deployment.version}")
        return LMI_VLLM.get(deployment.version, other)
    if deployment.version not in LMI_TENSORRT_LLM:
        known = ", ".join(LMI_TENSORRT_LLM)
        raise SettingsError(
            f"no LMI container has TensorRT-LLM {deployment.version}: the last has {known}",
            hint=f"`version: {known}` with `mode: engine`, the target `vllm`, or your own container as `compile.image`",
        )
    if deployment.mode == "bundle":
        raise SettingsError(
            f"LMI's container of TensorRT-LLM {deployment.version} serves engines, not a bundle",
            hint="set `mode: engine`, or compile for the target `vllm`",
        )
    return LMI_TENSORRT_LLM[deployment.version]


def triton(deployment: Deployment) -> Image:
    """The tritonserver for the deployment; SettingsError for a version that no image in the table holds."""
    if deployment.image is not None:
        return _own(deployment.image)
    if deployment.version not in TRITON:
        raise SettingsError(
            f"no tritonserver is known to have TensorRT-LLM {deployment.version}",
            hint=f"known: {', '.join(TRITON)}; or name a container of yours as `compile.image`",
        )
    return TRITON[deployment.version]


def server(deployment: Deployment) -> Image:
    """The runtime's own container: `trtllm-serve` (TensorRT-LLM's quick-start guide) or `vllm serve` (vLLM's docs)."""
    if deployment.image is not None:
        return _own(deployment.image)
    if deployment.runtime == "vllm":
        return Image(f"vllm/vllm-openai:v{deployment.version}", f"vLLM {deployment.version}")
    tag = f"nvcr.io/nvidia/tensorrt-llm/release:{deployment.version}"
    return Image(tag, f"TensorRT-LLM {deployment.version}")


def _own(reference: str) -> Image:
    """The user's; SettingsError for what is no reference of an image, for it is written into scripts."""
    if not _REFERENCE.fullmatch(reference):
        raise SettingsError(f"`compile.image` cannot be `{reference}`", hint="such as `registry.example/name:tag`")
    return Image(reference, "what its owner says")
