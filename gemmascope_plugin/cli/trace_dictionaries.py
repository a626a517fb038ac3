"""Which dictionaries ``gemmascope trace`` takes, and whether their files are here.

1. A release, or ``transcoder`` or ``clt``, with width, L0 and affine skip, has to leave one dictionary
   for each layer, or one CLT. Where it leaves several, the error has the options of the smallest whole
   suite, of those on this machine if there is one.
2. Files are found, and downloaded where there is a network, before the model is loaded.

Cost: the catalog; a look into the cache for each file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.cli.catalog_commands import search
from gemmascope_plugin.cli.options import BUNDLED
from gemmascope_plugin.errors import AmbiguousSpecError, MissingFileError, number_of, shorten

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec

_DEFAULTS = {BUNDLED: "gemma-2-tiny-skip-transcoders"}
_KINDS = ("transcoder", "clt")
_MAX_PATTERNS = 3
"""Of names that a command lists; beyond that one pattern for any L0."""


def dictionaries(model: str, transcoders: str | None, **filters: Any) -> list[SaeSpec]:
    """One dictionary for every layer, or one of all; ``filters`` are other arguments of ``find``."""
    named = transcoders or _DEFAULTS.get(model, "transcoder")
    kind = {"kind" if named in _KINDS else "release": named}
    specs = list(search(model=model, **kind, **filters))
    clts = [spec for spec in specs if spec.kind == "clt"]
    first = [spec for spec in specs if spec.layer == specs[0].layer]
    several = clts if len(clts) > 1 else first if not clts and len(first) > 1 else []
    if several:
        place = "as a CLT" if clts else f"for layer {first[0].layer}"
        raise AmbiguousSpecError(
            f"{len(several)} dictionaries match {place}",
            exists=shorten((f"{s.release} {s.sae_id}" for s in several), 4),
            fix=_narrower(specs),
        )
    return specs


def find_files(specs: Sequence[SaeSpec], local_dir: str | None) -> None:
    """Finds the files of all dictionaries, and downloads what is missing where that can be.

    The error says how many are missing, how large they are, and how they are fetched.
    """
    from gemmascope_plugin.loading.sources import is_here, locate

    for spec in specs:
        try:
            locate(spec, local_dir=local_dir)
        except MissingFileError as fault:
            absent = [each for each in specs if not is_here(each, local_dir)]
            raise MissingFileError(
                f"A trace needs {_count(specs)}, and {_share(absent, specs)} not "
                f"{'on this machine' if local_dir is None else f'in {local_dir!r}'}: "
                + re.split(r"\. (?:There is|Did you mean|Try)", str(fault))[0],
                fix=_download(absent, local_dir),
            ) from fault


def _narrower(specs: Sequence[SaeSpec]) -> str:
    """The options that leave one suite, the smallest that has every layer."""
    suites: dict[tuple[str, ...], list[SaeSpec]] = defaultdict(list)
    for spec in specs:
        suites[_options(spec)].append(spec)
    n_layers = max(len(suite) for suite in suites.values())
    single = {
        options: suite
        for options, suite in suites.items()
        if len(suite) == n_layers == len({spec.layer for spec in suite})
    }
    if not single:
        return "--transcoders RELEASE, --width, --l0, --affine or --no-affine"
    options, suite = min(single.items(), key=lambda each: (not _all_here(each[1]), _size(each[1])))
    return f"{' '.join(options)} ({_count(suite)})"


def _options(spec: SaeSpec) -> tuple[str, ...]:
    level = spec.l0_label or (None if spec.l0 is None else f"{spec.l0:g}")
    return (
        *("--transcoders", spec.release, "--width", spec.width),
        *(("--l0", level) if level else ()),
        "--affine" if spec.affine else "--no-affine",
    )


def _all_here(specs: Sequence[SaeSpec]) -> bool:
    from gemmascope_plugin.loading.sources import is_here

    return all(is_here(spec) for spec in specs)


def _size(specs: Sequence[SaeSpec]) -> int:
    return sum(spec.nbytes for spec in specs)


def _count(specs: Sequence[SaeSpec]) -> str:
    noun = "CLT" if specs[0].kind == "clt" else "dictionary"
    return f"{number_of(len(specs), noun)}, {human_size(_size(specs))}"


def _share(absent: Sequence[SaeSpec], specs: Sequence[SaeSpec]) -> str:
    if len(absent) == len(specs):
        return "it is" if len(specs) == 1 else "they are"
    return f"{len(absent)} of these {'is' if len(absent) == 1 else 'are'}"


def _download(absent: Sequence[SaeSpec], local_dir: str | None) -> str:
    """One command that fetches all, where there is one repository."""
    if local_dir is not None:
        return "another folder, or no --local-dir"
    repositories = {spec.repo_id for spec in absent}
    if len(repositories) != 1:
        return "--local-dir FOLDER, which mirrors the repository"
    names = {re.sub(r"layer_\d+", "layer_*", name) for spec in absent for name in _names(spec)}
    if len(names) > _MAX_PATTERNS:
        names = {re.sub(r"l0_\d+", "l0_*", name) for name in names}
    includes = " ".join(f"--include '{name}'" for name in sorted(names))
    return (
        f"hf download {repositories.pop()} {includes} --local-dir FOLDER, where there is a network, "
        "then --local-dir FOLDER here"
    )


def _names(spec: SaeSpec) -> tuple[str, ...]:
    config = spec.config_filename
    return spec.filenames if config is None else (*spec.filenames, config)
