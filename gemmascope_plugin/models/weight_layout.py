"""Where the weights of a model are: a name, a folder or a file becomes something transformers reads.

1. A folder is taken as it is; a GGUF file is converted into one, once (``gguf_folder.py``).
2. A name is resolved as ``find(model=...)`` does: ``4b-it`` is ``google/gemma-3-4b-it``.  A bare name
   that no Gemma 2 or 3 has is refused here; the hub would be asked for a minute.
3. Of a name, ``source`` says which copy: files in the hub's cache, the package of the extra ``[gemma]``
   (Gemma 3 270M only), or the hub.  ``"auto"`` takes the first of these that there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gemmascope_plugin.catalog.tables import models, resolve_model
from gemmascope_plugin.errors import MissingFileError, ModelError, UnknownNameError, check_choice
from gemmascope_plugin.errors import nearest as nearest_of
from gemmascope_plugin.models.gguf_folder import (
    PACKAGE,
    PACKAGE_MODEL,
    converted,
    converted_package,
    package_version,
    recorded_quantisation,
)

Source = Literal["auto", "hub", "cache", "package"]
"""Which copy of the weights of a named model."""

_OWNER = "google/"
_BUNDLED = "gemma-2-tiny"
_PUBLISHED = frozenset(
    f"gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("", "-it")
) | frozenset(
    ["gemma-2-2b-jpn-it", "gemma-3-270m", "gemma-3-270m-it"]
    + [f"gemma-3-{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("pt", "it")]
)
"""Google's models, with and without dictionaries in the catalog."""
_INDEX_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Weights:
    """Weights that transformers can read."""

    place: str
    """A folder, or the name of a repository."""
    name: str
    """Name of the model, without its owner."""
    origin: str
    """What to tell people; for a repository its commit is added when it is known."""
    is_repository: bool = False
    only_cached: bool = False


def find_weights(name_or_path: str | Path, source: Source = "auto") -> Weights:
    """The weights that are meant."""
    check_choice("source", source, get_args(Source))
    path = Path(name_or_path).expanduser()
    text = str(path)
    is_path = isinstance(name_or_path, Path) or text.startswith(("/", ".", "~"))
    if path.is_dir() or path.is_file() or is_path or path.suffix.lower() == ".gguf":
        return _from_path(path, source)
    repository = hub_name(str(name_or_path))
    return _named(repository, source)


def hub_name(name: str) -> str:
    """The repository that a name means: ``2b`` and ``gemma-2-2b`` are ``google/gemma-2-2b``.

    Of another owner it is taken literally.
    """
    owner, slash, _ = name.rpartition("/")
    if slash and f"{owner}/" != _OWNER:
        return name
    if name == _BUNDLED:
        raise MissingFileError(
            f"The model {name!r} is not on the hub",
            fix="gemmascope_plugin.tiny().model, which ships with the package",
        )
    gemmas = {model for model in models().values() if model.startswith(("gemma-2-", "gemma-3-"))}
    gemmas = (gemmas | _PUBLISHED) - {_BUNDLED}
    model = resolve_model(name, gemmas)
    if model is not None:
        return f"{_OWNER}{model}"
    if slash:
        return name
    raise UnknownNameError(
        f"{name!r} is not the name of a Gemma 2 or Gemma 3",
        exists=", ".join(sorted(gemmas)),
        nearest=nearest_of(name, gemmas),
        fix="one of these, owner/name of a repository on the hub, a folder, or a GGUF file",
    )


def is_cached(repository: str) -> bool:
    """Whether config and weights of a repository are in the hub's cache."""
    return _in_cache(repository, "config.json") and any(
        _in_cache(repository, file) for file in _INDEX_FILES
    )


def _in_cache(repository: str, file: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE)
    return isinstance(path, str)


def _from_path(path: Path, source: Source) -> Weights:
    if source != "auto":
        raise ModelError(
            f"source={source!r} does not go with the path {str(path)!r}",
            fix='source="auto", or the name of a model',
        )
    if path.is_dir():
        return Weights(str(path), path.name or path.resolve().name, f"folder {path.name!r}")
    if not path.is_file():
        raise MissingFileError(
            f"There is no folder {str(path)!r}",
            fix="the folder that save_pretrained() wrote, a GGUF file, or a name on the hub like "
            "gemma-2-2b",
        )
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            f"{str(path)!r} is a file",
            exists="folders that save_pretrained() wrote, and GGUF files",
            fix="the folder that the file lies in",
        )
    folder = converted(path)
    kind = recorded_quantisation(folder)
    return Weights(str(folder), folder.name, f"GGUF file {path.name!r}, dequantised from {kind}")


def _named(repository: str, source: Source) -> Weights:
    name = repository.rpartition("/")[2]
    if source == "auto":
        source = _first_copy(repository)
    if source == "package":
        return _packaged(repository)
    if source == "cache" and not is_cached(repository):
        raise MissingFileError(
            f"The hub's cache does not hold {repository}",
            fix=f'`hf download {repository}`, or source="auto"',
        )
    return Weights(
        repository, name, f"{repository} on the Hugging Face hub", True, source == "cache"
    )


def _first_copy(repository: str) -> Source:
    if is_cached(repository):
        return "cache"
    if repository == f"{_OWNER}{PACKAGE_MODEL}" and package_version() is not None:
        return "package"
    return "hub"


def _packaged(repository: str) -> Weights:
    if repository != f"{_OWNER}{PACKAGE_MODEL}":
        raise MissingFileError(
            f"No package holds {repository}",
            exists=f"{PACKAGE_MODEL} in {PACKAGE}",
            fix='source="auto"',
        )
    folder = converted_package()
    origin = (
        f"package {PACKAGE} {package_version()}, {PACKAGE_MODEL} dequantised from 4 bits "
        f"({recorded_quantisation(folder)})"
    )
    return Weights(str(folder), PACKAGE_MODEL, origin)
