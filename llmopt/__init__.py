"""Quantize, compile and load-test language models into verified, reproducible artifacts."""

__version__ = "0.1.0"
