"""OpenVINO: a checkpoint as a stateful IR that openvino-genai serves on a CPU."""
