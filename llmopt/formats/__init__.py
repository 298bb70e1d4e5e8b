"""Quantized tensors on disk: the same integers in the encodings that runtimes read."""
