"""What writers of a pass would add if they were replaced, and what each reader misses of it.

1. What was written so far is a table of vectors per circuit and token: ``u' - u`` of the embedding and of
   each MLP; of the heads of a layer their sum ``a`` and the differences ``dr_h``, all times the gain of
   the norm behind them.
2. A reader without the heads of the set ``m`` sees ``ln1_post(a + sum_h m_h dr_h) - ln1_post(a)``. That
   is a combination of the same vectors, with the scales ``s`` of both: ``(1/s_m - 1/s_0) a + sum_h
   (m_h / s_m) dr_h``. The square of a scale is ``v^T G v / d_model + eps`` with ``v = (1, m)`` and ``G``
   the inner products of ``(a, dr_1, ...)``, which are formed once per layer and not once per reader.
   Heads that nearly cancel ``a`` cost digits there, so ``G`` is in float64.
3. What all readers of a norm miss is then one product per token: coefficients times the table.

Cost: ``2 * edges * d_model`` operations per token and circuit; ``(writers + layers) * d_model`` numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.models.anatomy import Anatomy


class WriterChanges:
    """What has been written in one pass of several circuits, and what ``removed`` edges miss of it."""

    def __init__(
        self,
        anatomy: Anatomy,
        edges: EdgeMap,
        removed: Bool[torch.Tensor, "circuit writer reader"],
        like: Float[torch.Tensor, "prompt pos d_model"],
    ) -> None:
        self._anatomy, self._edges = anatomy, edges
        self._removed = removed.transpose(1, 2).to(like.dtype)
        n = len(edges.writers) + edges.n_layers
        self._table = like.new_zeros(len(removed), *like.shape[:2], n, like.shape[2])
        self._stop = 0
        """Vectors of the table that have been written; of others nothing is missing yet."""
        self._inner: dict[int, torch.Tensor] = {}
        """Layer to ``G`` of its heads ``[circuit, token, 1 + head, 1 + head]``."""

    def add(self, row: int, moved: Float[torch.Tensor, "some prompt pos d_model"]) -> None:
        """The embedding or an MLP has written: ``u' - u`` of each circuit, or one for all."""
        writer = self._edges.writers[row]
        place = row + (0 if writer.kind == "embed" else writer.layer + 1)
        self._table[:, :, :, place] = moved
        self._stop = max(self._stop, place + 1)

    def add_heads(
        self,
        layer: int,
        a: Float[torch.Tensor, "some prompt pos d_model"],
        moved: Float[torch.Tensor, "some prompt pos head d_model"],
    ) -> None:
        """The heads of a layer have written ``a`` together, before the norm behind; ``dr`` of each."""
        vectors, places = torch.cat([a[..., None, :], moved], -2), self._places(layer)
        post = self._anatomy.norm(layer, "ln1_post")
        if post is not None:
            exact = vectors.flatten(1, 2).double()
            self._inner[layer] = exact @ exact.transpose(-1, -2)
            if post.gain is not None:
                vectors = vectors * post.gain.to(vectors)
        self._table[:, :, :, places] = vectors
        self._stop = max(self._stop, places.stop)

    def change(self, readers: slice) -> Float[torch.Tensor, "circuit prompt pos reader d_model"]:
        """What readers of one norm see beyond the live stream."""
        removed, shape = self._removed[:, readers], self._table.shape[:3]
        n_tokens, n_readers = shape[1] * shape[2], removed.shape[1]
        share = removed.new_zeros(len(removed), n_tokens, n_readers, self._stop)
        share[..., :1] = removed[:, None, :, :1]
        for layer in range(self._edges.n_layers):
            places, mlp = self._places(layer), self._edges.mlp(layer)
            if places.start >= self._stop:
                break
            share[..., places] = self._of_heads(layer, removed)
            if places.stop < self._stop:
                share[..., places.stop] = removed[:, None, :, mlp]
        table = self._table[..., : self._stop, :].flatten(0, 2)
        return torch.bmm(share.flatten(0, 1), table).unflatten(0, shape)

    def _of_heads(
        self, layer: int, removed: Float[torch.Tensor, "circuit reader writer"]
    ) -> Float[torch.Tensor, "circuit token reader vector"]:
        """Coefficients of ``a`` and of each head."""
        without = removed[..., self._edges.heads(layer)]
        if layer not in self._inner:  # no norm, or nothing to miss
            return torch.nn.functional.pad(without, (1, 0))[:, None]
        post = self._anatomy.norm(layer, "ln1_post")
        assert post is not None, "inner products are those of a norm"
        v = torch.nn.functional.pad(without, (1, 0), value=1.0).double()
        pairs = (v[..., :, None] * v[..., None, :]).flatten(-2)
        inner = self._inner[layer].flatten(-2)
        d = self._table.shape[-1]
        inverse = (inner @ pairs.transpose(-1, -2) / d + post.eps).rsqrt()
        alone = (inner[..., :1] / d + post.eps).rsqrt()
        heads = inverse[..., None] * v[:, None, :, 1:]
        return torch.cat([(inverse - alone)[..., None], heads], -1).to(removed)

    def _places(self, layer: int) -> slice:
        """Where the heads of a layer are in the table, their sum before them."""
        heads = self._edges.heads(layer)
        return slice(heads.start + layer, heads.stop + layer + 1)
