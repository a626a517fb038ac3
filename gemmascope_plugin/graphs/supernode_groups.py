"""Named groups of nodes of an attribution graph, as an object that is edited by making new ones.

It is a mapping from names to ids of nodes, so ``graph.to_json(slug, groups=supernodes)`` hands it to the
viewers. Ids are checked against a graph when it is collapsed.

Cost: that of its own size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import (
    BadFileError,
    EmptySelectionError,
    GemmaScopeError,
    MissingFileError,
    UnknownNameError,
    nearest,
    shorten,
)
from gemmascope_plugin.files.json_file import read_json
from gemmascope_plugin.graphs.collapse import Edges, collapse
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.viewer_files import write_json

if TYPE_CHECKING:
    import pandas as pd

KEY = "supernodes"
MAX_SIZE = 1 << 26
SHOWN = 5
"""Groups that a repr names."""
ROWS = 12
"""Groups of a table in a notebook."""


class Supernodes(Mapping[str, tuple[str, ...]]):
    """Groups of nodes, immutable.

    Args:
        groups: Name to ids of nodes, or pairs of both; an id is in one group only.

    Raises:
        GemmaScopeError: A name that is there twice, or a node in two groups.
        EmptySelectionError: A group without nodes, or without a name.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]] = ()
    ) -> None:
        items: Any = groups.items() if isinstance(groups, Mapping) else groups
        pairs: Iterable[tuple[str, Sequence[str]]] = items
        self._groups: dict[str, tuple[str, ...]] = {}
        self._group_of: dict[str, str] = {}
        for name, ids in pairs:
            self._check_new(name)
            if not name or isinstance(ids, str) or not len(ids):
                raise EmptySelectionError(
                    f"The group {name!r} has the nodes {ids!r}",
                    exists="names with lists of node ids",
                )
            for node in ids:
                if node in self._group_of:
                    raise GemmaScopeError(
                        f"The node {node!r} is in the groups {self._group_of[node]!r} and {name!r}",
                        fix="each node in one group, once",
                    )
                self._group_of[node] = name
            self._groups[name] = tuple(ids)

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def rename(self, name: str, new: str) -> Supernodes:
        """Another name for a group.

        Raises:
            UnknownNameError: No such group.
            GemmaScopeError: The new name is taken.
        """
        self._check_known(name)
        self._check_new(new, besides=(name,))
        return Supernodes([(new if n == name else n, ids) for n, ids in self.items()])

    def merge(self, *names: str, name: str | None = None) -> Supernodes:
        """Several groups as one, in the place of the first.

        Args:
            *names: The groups.
            name: Of the new one; that of the first by default.

        Raises:
            UnknownNameError: No such group.
            EmptySelectionError: Fewer than two groups.
            GemmaScopeError: The name is taken.
        """
        names = tuple(dict.fromkeys(names))
        for each in names:
            self._check_known(each)
        if len(names) < 2:
            raise EmptySelectionError(
                f"{len(names)} group cannot be merged", fix=".merge('one', 'other')"
            )
        new = names[0] if name is None else name
        self._check_new(new, besides=names)
        joined = [node for each in names for node in self[each]]
        return Supernodes(
            [
                (new, joined) if each == names[0] else (each, ids)
                for each, ids in self.items()
                if each not in names[1:]
            ]
        )

    def move(self, node: str, to: str) -> Supernodes:
        """A node in another group, whether it was in one or not; a group that is left empty goes.

        Args:
            node: Its id.
            to: The group.

        Raises:
            UnknownNameError: No such group.
        """
        self._check_known(to)
        moved = {n: [*(i for i in ids if i != node)] for n, ids in self.items()}
        moved[to].append(node)
        return Supernodes({n: ids for n, ids in moved.items() if ids})

    def split(self, name: str, nodes: Sequence[str], new: str) -> Supernodes:
        """Some nodes of a group as a group of their own, behind it.

        Args:
            name: The group.
            nodes: Ids of some of its nodes.
            new: Name of their group.

        Raises:
            UnknownNameError: No such group, or a node that is not in it.
            EmptySelectionError: All of its nodes, or none.
            GemmaScopeError: The new name is taken.
        """
        self._check_known(name)
        self._check_new(new)
        for node in nodes:
            if node not in self[name]:
                raise UnknownNameError(
                    f"The group {name!r} has no node {node!r}",
                    exists=shorten(self[name]),
                    nearest=nearest(node, self[name]),
                )
        left = [node for node in self[name] if node not in nodes]
        if not left or not len(nodes):
            raise EmptySelectionError(
                f"{len(nodes)} of {len(self[name])} nodes of {name!r} leave nothing to split",
                fix=f".rename({name!r}, {new!r}), or some of the nodes",
            )
        groups: list[tuple[str, Sequence[str]]] = []
        for each, ids in self.items():
            groups += [(each, left), (new, tuple(nodes))] if each == name else [(each, ids)]
        return Supernodes(groups)

    def without(self, *names: str) -> Supernodes:
        """The same without some groups, or without some nodes.

        Args:
            *names: Names of groups, ids of nodes.

        Raises:
            UnknownNameError: Neither a group nor a node of one.
        """
        for name in names:
            if name not in self._groups and name not in self._group_of:
                self._check_known(name)
        left = {
            name: [node for node in ids if node not in names]
            for name, ids in self.items()
            if name not in names
        }
        return Supernodes({name: ids for name, ids in left.items() if ids})

    def to_json(self) -> dict[str, Any]:
        """``{"supernodes": [[name, id, ...], ...]}``, as the viewers keep groups."""
        return {KEY: [[name, *ids] for name, ids in self.items()]}

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`to_json` into a file, whole; :meth:`load` reads it.

        Raises:
            GemmaScopeError: The file cannot be written.
        """
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Supernodes:
        """Reads what :meth:`save` has written; see :meth:`from_json`."""
        return cls.from_json(path)

    def to_frame(self) -> pd.DataFrame:
        """One row per node: ``group, node``."""
        import pandas as pd

        pairs = [(name, node) for name, ids in self.items() for node in ids]
        return pd.DataFrame(pairs, columns=["group", "node"])

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Supernodes:
        """Reads what :meth:`to_json` gives, from a file or as it is.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged.
            GemmaScopeError: A name that is there twice, or a node in two groups.
        """
        content, name = source, "the mapping"
        if not isinstance(source, Mapping):
            path = Path(source).expanduser()
            name = repr(str(path))
            if not path.is_file():
                raise MissingFileError(f"There are no supernodes at {name}")
            content = read_json(path, max_size=MAX_SIZE, fix="write the supernodes again")
        groups: Any = content.get(KEY) if isinstance(content, Mapping) else None
        texts = isinstance(groups, list) and all(
            isinstance(row, list) and row and all(isinstance(text, str) for text in row)
            for row in groups
        )
        if not texts:
            raise BadFileError(
                f"{name} holds no supernodes", exists='{"supernodes": [["name", "id", ...], ...]}'
            )
        return cls([(row[0], row[1:]) for row in groups])

    def collapse(self, graph: Graph, edges: Edges = "influence") -> Graph:
        """The graph with one node per group; see ``collapse.py`` for what its edges are.

        Raises:
            UnknownNameError: A node that the graph does not have.
            GemmaScopeError: A token or target in a group, or nodes of different sorts in one.
        """
        return collapse(graph, self, edges)

    def _check_known(self, name: str) -> None:
        if name not in self._groups:
            raise UnknownNameError(
                f"There is no group {name!r}",
                exists=shorten(self._groups) or "no group",
                nearest=nearest(name, self._groups),
            )

    def _check_new(self, name: str, besides: Sequence[str] = ()) -> None:
        if name in self._groups and name not in besides:
            raise GemmaScopeError(
                f"There is a group {name!r} already",
                exists=shorten(self._groups),
                fix="another name",
            )

    def _repr_html_(self) -> str:
        import pandas as pd

        sizes = pd.DataFrame({"group": list(self), "nodes": [len(ids) for ids in self.values()]})
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(sizes, ROWS)}"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {len(ids)}" for name, ids in [*self.items()][:SHOWN])
        more = ", ..." if len(self) > SHOWN else ""
        return f"Supernodes({len(self)} groups of {len(self._group_of)} nodes: {shown}{more})"
