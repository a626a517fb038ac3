"""Weights in llama.cpp's GGUF format become a Hugging Face folder, once."""

from gemmascope_plugin.models.gguf.hf_folder import converted, converted_package

__all__ = ["converted", "converted_package"]
