"""Activations on disk: written once by one forward pass over the text, read back as buckets.

1. ``store_activations`` writes shards of a fixed number of tokens, ``shard_00000.safetensors`` and so on,
   each with one array ``[token, width]`` per hook, and last of all ``index.json``: a folder without it is
   not complete.
2. ``ActivationStore`` maps the shards; nothing is read until it is used.
3. A shard is a bucket. Every epoch takes the shards in a new order, which follows from the seed.

No pickle: safetensors and JSON, each file under a temporary name until it is whole.

Cost: ``tokens * sum of widths * bytes`` of disk, one partial forward pass per row of text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.arguments import dtype_name
from gemmascope_plugin.errors import (
    BadFileError,
    GemmaScopeError,
    MissingFileError,
    MissingHookError,
    check_choice,
    nearest,
    shorten,
)
from gemmascope_plugin.files.json_file import Record, read_json
from gemmascope_plugin.files.lock import LOCK, folder_lock
from gemmascope_plugin.files.whole import write_text_whole, write_whole
from gemmascope_plugin.loading.arrays import ArrayFile, safetensors_arrays
from gemmascope_plugin.loading.export import write_safetensors
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.training.buckets import Bucket, ForwardReader
from gemmascope_plugin.training.text_batches import Corpus, TokenStream

INDEX, FORMAT = "index.json", 1
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@gate(model=check_model)
def store_activations(
    model: HookedModel,
    corpus: Corpus,
    hooks: Sequence[str],
    folder: str | Path,
    *,
    tokens: int,
    shard: int = 1 << 18,
    exclude: Sequence[str | int] = ("bos", "eos", "pad"),
    context: int = 1024,
    rows: int = 32,
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
) -> ActivationStore:
    """Writes the activations of a corpus at some hooks.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        corpus: Texts, token ids ``[row, pos]``, or batches of them.
        hooks: Names of the tensors.
        folder: Where; must not hold anything yet.
        tokens: How many activations, excluded tokens not counted; rounded up to whole shards. A corpus
            that can be read again is read again when it ends.
        shard: Activations per file.
        exclude: Special tokens to leave out.
        context: Longest piece of text.
        rows: Pieces of text per forward pass.
        dtype: Type in the files: float32, bfloat16 or float16.
        seed: Of the order of rows.

    Returns:
        The store.

    Raises:
        FolderInUseError: Another process writes into it.
        GemmaScopeError: The folder holds something, or cannot be written.
        EmptySelectionError: There is too little text.
    """
    dtype = dtype_name(dtype)
    check_choice("dtype", dtype, DTYPES)
    folder = Path(folder)
    with folder_lock(folder, "storing activations"):
        if any(path.name != LOCK for path in folder.iterdir()):
            raise GemmaScopeError(
                f"{str(folder)!r} is not empty", fix="another folder, or delete it"
            )
        stream = TokenStream(model, corpus, context=context, rows=rows, seed=seed)
        reader = ForwardReader(model, stream, hooks, exclude=exclude, bucket=shard)
        sizes, widths = _write_shards(folder, reader, hooks, tokens, shard, DTYPES[dtype])
        index = {
            "format": FORMAT,
            "model": str(model.cfg.model_name),
            "hooks": widths,
            "dtype": dtype,
            "exclude": list(exclude),
            "shards": sizes,
        }
        write_text_whole(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return ActivationStore(folder)


def _write_shards(
    folder: Path,
    reader: ForwardReader,
    hooks: Sequence[str],
    tokens: int,
    shard: int,
    dtype: torch.dtype,
) -> tuple[list[int], dict[str, int]]:
    """Writes all files; returns their sizes and the widths of the tensors."""
    sizes: list[int] = []
    rest: Bucket = {name: torch.empty(0) for name in hooks}
    while sum(sizes) < tokens:
        bucket = reader.next_bucket()
        rest = {n: torch.cat([rest[n], b]) if len(rest[n]) else b for n, b in bucket.items()}
        while sum(sizes) < tokens and len(next(iter(rest.values()))) >= shard:
            part = {name: values[:shard].to(dtype) for name, values in rest.items()}
            _write_shard(folder / _name(len(sizes)), part)
            sizes.append(shard)
            rest = {name: values[shard:] for name, values in rest.items()}
    return sizes, {name: values.shape[1] for name, values in rest.items()}


def _write_shard(path: Path, part: Bucket) -> None:
    write_whole(path, lambda file: write_safetensors(file, part))


def _name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


class ActivationStore:
    """A folder of stored activations.

    Args:
        folder: What ``store_activations`` wrote.

    Raises:
        MissingFileError: There is no store, or not all of it.
        BadFileError: A file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise MissingFileError(
                f"There are no whole activations in {str(folder)!r}: no {INDEX}",
                fix="store_activations(model, corpus, hooks, folder, tokens=...)",
            )
        fix = "write the activations again, into another folder"
        index = Record(read_json(self.folder / INDEX, fix=fix), self.folder / INDEX, fix)
        if index.content.get("format") != FORMAT:
            raise BadFileError(
                f"{str(self.folder / INDEX)!r} has format {index.content.get('format')!r}",
                exists=f"format {FORMAT}",
            )
        self.widths: dict[str, int] = index.dict_of("hooks", int)
        """Width of the tensor at every hook."""
        self.shards: list[int] = index.list_of("shards", int)
        """Activations per file."""
        if not self.shards or min([*self.shards, *self.widths.values()]) < 1 or not self.widths:
            index.bad("it names no activations, or sizes below 1")
        self.model: str = index.get("model", str)
        self.exclude: tuple[str | int, ...] = tuple(index.get("exclude", list))
        if not all(type(token) in (int, str) for token in self.exclude):
            index.bad(f"'exclude' is {list(self.exclude)!r}, not token ids and names")
        if index.get("dtype", str) not in DTYPES:
            index.bad(f"'dtype' is {index.content['dtype']!r}, not one of {', '.join(DTYPES)}")
        self._dtype = DTYPES[index.content["dtype"]]
        self._files = [self._open(i) for i in range(len(self.shards))]

    def _open(self, number: int) -> ArrayFile:
        path = self.folder / _name(number)
        arrays = safetensors_arrays(path)
        for name, width in self.widths.items():
            shape = (self.shards[number], width)
            if (
                name not in arrays
                or arrays[name].shape != shape
                or arrays[name].dtype != self._dtype
            ):
                raise BadFileError(
                    f"{str(path)!r} has no {self._dtype} array {name!r} {list(shape)}",
                    fix="write the activations again",
                )
        return ArrayFile(path=path, source=path, arrays=arrays)

    def __len__(self) -> int:
        """Number of activations."""
        return sum(self.shards)

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.folder)!r}, {len(self)} activations of {self.model} at "
            f"{shorten(self.widths)}, excluded {', '.join(map(str, self.exclude)) or 'nothing'})"
        )

    def shard(self, number: int, hooks: Sequence[str]) -> Bucket:
        """The activations of one file, memory-mapped.

        Raises:
            MissingHookError: A hook that was not stored.
        """
        for name in hooks:
            if name not in self.widths:
                raise MissingHookError(
                    f"The activations at {name!r} were not stored",
                    exists=shorten(self.widths),
                    nearest=nearest(name, self.widths),
                )
        return {name: self._files[number].tensor(name) for name in hooks}


class StoreReader:
    """The shards of a store in a random order, epoch after epoch."""

    def __init__(self, store: ActivationStore, hooks: Sequence[str], *, seed: int) -> None:
        self._store, self._hooks, self._seed = store, tuple(hooks), seed
        self._read = 0

    def next_bucket(self) -> Bucket:
        """The next shard."""
        epoch, place = divmod(self._read, len(self._store.shards))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        number = int(torch.randperm(len(self._store.shards), generator=generator)[place])
        self._read += 1
        bucket = self._store.shard(number, self._hooks)
        for name, values in bucket.items():
            if not torch.isfinite(values).all():
                raise BadFileError(
                    f"The activations at {name!r} in {_name(number)} hold values that are not finite",
                    fix="write them again as float32 or bfloat16",
                )
        return bucket

    def state(self) -> dict[str, Any]:
        """The place, as plain values, with what tells stores apart."""
        return {"shards_read": self._read, "shards": self._store.shards, "model": self._store.model}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place."""
        self._read = state["shards_read"]
