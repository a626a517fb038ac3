"""Writes circuits into the weights of a small Gemma 2 by hand.

The norms of Gemma divide by the length of a whole vector: a circuit is exact only if lengths do not move.

1. The residual stream is cut into named spaces: one constant entry, the position and the content of the
   token (one-hot each), and one space for every component that writes. No two components share one.
2. What a layer's attention, or an MLP, writes goes through its post-norm, whose gain is one number: a
   vector of length 1, whatever was computed. The stream therefore has the same length on every prompt,
   and still has it when a writer's contribution is swapped for that of another run.
3. Weights are given in units of the stream (``height`` of a one-hot entry). The known length and the
   random gains of ``ln1``, ``ln2`` and ``ln_final`` are divided out as they are written.
4. A token is a content at a position, so nothing depends on RoPE: its base is 1e18 and its fastest
   entries are left empty, as is their rotated half.
5. Heads that look at positions attend hard (a score of 30 before the cap of 20). Heads that compare
   contents attend softly, so that gradients reach their queries and keys.
6. Noise. In layers of the circuit: two heads that copy some token into a space nobody needs, of constant
   length since attention is hard and their columns orthogonal, and one that writes a constant. Elsewhere:
   random heads. All other MLPs are random. They read everything and differ between clean and corrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch

from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf

N_HEADS, N_KV, D_HEAD, D_MLP = 4, 2, 32, 16
GROUP = N_HEADS // N_KV
FIRST_ID = 4
"""Ids below stand for padding and the like and are in no prompt."""
CONSTANT = 16.0
"""Height of the constant entry: so large that a swap moves lengths little to first order, too."""
ATTENTION_CAP, LOGIT_CAP = 20.0, 10.0
QUERY_SCALAR = 24
HARD, SOFT = 30.0, 4.0
"""Scores, before the cap, of the one position that is looked at; of a content that is looked for."""
NOISE, REST = 0.3, 1.5
"""Length of what a noise head and the constant head write, beside 1 of a head of the circuit."""
LOGIT = 6.0
"""Logit of the answer before the cap, if its space has its full height."""

Edge = tuple[Node, Reader]


def tokens(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Prompts from their contents: ids ``[prompt, pos]``."""
    n = len(rows[0])
    return torch.tensor([[FIRST_ID + c * n + p for p, c in enumerate(row)] for row in rows])


def answers(contents: Sequence[int], positions: int) -> list[int]:
    """An id for each content; all tokens of a content have the same logit."""
    return [FIRST_ID + content * positions for content in contents]


class Builder:
    """A blank Gemma 2 whose weights are filled in, in the order of the forward pass.

    Args:
        n_layers: Blocks.
        positions: Length of the prompts.
        contents: Number of token contents.
        spaces: Spaces of the stream beside ``constant``, ``position`` and ``content``, with their sizes.
    """

    def __init__(
        self, *, n_layers: int, positions: int, contents: int, spaces: Mapping[str, int]
    ) -> None:
        self.positions, self.contents = positions, contents
        self.spaces: dict[str, slice] = {}
        width = 0
        spaces_of_tokens = {"constant": 1, "position": positions, "content": contents}
        for name, n in (spaces_of_tokens | dict(spaces)).items():
            self.spaces[name] = slice(width, width + n)
            width += n
        self.height = {"constant": CONSTANT, "position": 1.0, "content": 1.0}
        self.random = torch.Generator().manual_seed(0)
        # transformers wants a multiple of the number of heads; the entries added are always zero
        width = -(-width // N_HEADS) * N_HEADS
        self.hf = _blank(n_layers, width, FIRST_ID + positions * contents)
        self._embed()
        self._norms()

    # Attention

    def attend_position(self, layer: int, head: int, target: Callable[[int], int]) -> None:
        """From position ``p`` to ``target(p)``, which must not lie after it."""
        to = torch.zeros(self.positions, self.positions)
        for position in range(self.positions):
            assert target(position) <= position
            to[target(position), position] = 1.0
        entries, strength = self._entries("position"), _strength(HARD)
        self._read(self._rows(layer, "q", head, entries), 2 * layer, "position", strength * to)
        keys = self._rows(layer, "k", head // GROUP, entries)
        self._read(keys, 2 * layer, "position", strength * torch.eye(self.positions))

    def attend_content(self, layer: int, head: int, *, query: str, key: str) -> None:
        """To the positions that hold in space ``key`` what this one holds in ``query``."""
        entries, eye = self._entries("content"), _strength(SOFT) * torch.eye(self.contents)
        self._read(self._rows(layer, "q", head, entries), 2 * layer, query, eye)
        self._read(self._rows(layer, "k", head // GROUP, entries), 2 * layer, key, eye)

    def value(self, layer: int, kv: int, space: str) -> None:
        """Values are the one-hot content in ``space``, at unit length."""
        rows = self._rows(layer, "v", kv, slice(self.contents))
        self._read(rows, 2 * layer, space, torch.eye(self.contents))

    def output(self, layer: int, head: int, space: str) -> None:
        """Writes the value into ``space``, in a layer with two noise heads and a constant one."""
        self._write_head(layer, head, space, torch.eye(self.contents))
        self.height[space] = 1 / sqrt(1 + 2 * NOISE**2 + REST**2)

    def noise_head(
        self, layer: int, head: int, space: str, target: Callable[[int], int], value: bool
    ) -> None:
        """Copies the token at a position into a space of its own, mixed; ``value=False`` takes the
        values of its key-value head as they are."""
        self.attend_position(layer, head, target)
        if value:
            self.value(layer, head // GROUP, "content")
        mixed = torch.linalg.qr(torch.randn(self.contents, self.contents, generator=self.random))[0]
        self._write_head(layer, head, space, NOISE * mixed)

    def constant_head(self, layer: int, head: int, space: str) -> None:
        """Writes the same everywhere, so that the post-norm depends less on the other heads."""
        slot = self.contents
        rows = self._rows(layer, "v", head // GROUP, slice(slot, slot + 1))
        self._read(rows, 2 * layer, "constant", torch.ones(1, 1))
        self._layer(layer).self_attn.o_proj.weight[self.spaces[space], head * D_HEAD + slot] = REST

    def random_attention(self, layer: int, space: str) -> None:
        """All heads read everything and write into ``space``."""
        for port, n in (("q", N_HEADS), ("k", N_KV), ("v", N_KV)):
            for head in range(n):
                self._read_all(self._rows(layer, port, head, slice(D_HEAD)), 2 * layer, 0.4)
        for head in range(N_HEADS):
            weight = torch.randn(self._size(space), D_HEAD, generator=self.random)
            self._layer(layer).self_attn.o_proj.weight[
                self.spaces[space], head * D_HEAD : (head + 1) * D_HEAD
            ] = weight

    # MLPs and logits

    def random_mlp(self, layer: int, space: str) -> None:
        """Reads everything and writes into ``space``."""
        mlp = self._layer(layer).mlp
        self._read_all(mlp.gate_proj.weight, 2 * layer + 1, 0.7)
        self._read_all(mlp.up_proj.weight, 2 * layer + 1, 0.7)
        shape = (self._size(space), D_MLP)
        mlp.down_proj.weight[self.spaces[space]] = torch.randn(shape, generator=self.random)

    def neuron(
        self,
        layer: int,
        index: int,
        gate: Mapping[tuple[str, int], float],
        to: tuple[str, int],
        weight: float = 1.0,
    ) -> None:
        """``weight * gelu(sum of gate[space, entry] * one-hot entry)``, written at ``to``."""
        mlp, half = self._layer(layer).mlp, 2 * layer + 1
        for (space, entry), strength in gate.items():
            row = torch.zeros(1, self._size(space))
            row[0, entry] = strength
            self._read(mlp.gate_proj.weight[index : index + 1], half, space, row)
        self._read(mlp.up_proj.weight[index : index + 1], half, "constant", torch.ones(1, 1))
        mlp.down_proj.weight[self.spaces[to[0]].start + to[1], index] = weight

    def unembed(self, space: str, logit: float = LOGIT) -> None:
        """A content in ``space`` raises the logits of all tokens with this content."""
        of_content = torch.eye(self.contents).repeat_interleave(self.positions, 0)
        half = 2 * len(self.hf.model.layers)
        self._read(self.hf.lm_head.weight[FIRST_ID:], half, space, logit * of_content)

    def finish(self, backend: str) -> Any:
        """The model as ``hooked`` (HookedTransformer) or ``bridge`` (TransformerBridge)."""
        build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
        return build(self.hf, None, "ground-truth")

    # Inside

    def _embed(self) -> None:
        weight = self.hf.model.embed_tokens.weight
        scale = 1 / sqrt(weight.shape[1])  # Gemma multiplies by the root of d_model
        for content in range(self.contents):
            for position in range(self.positions):
                row = weight[FIRST_ID + content * self.positions + position]
                row[0] = CONSTANT * scale
                row[self.spaces["position"].start + position] = scale
                row[self.spaces["content"].start + content] = scale

    def _norms(self) -> None:
        """Random gains before; after, one number that gives length 1."""
        for norm in [*self._pre_norms(), self.hf.model.norm]:
            norm.weight.uniform_(-0.5, 0.5, generator=self.random)
        for block in self.hf.model.layers:
            for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                norm.weight.fill_(1 / sqrt(len(norm.weight)) - 1)  # Gemma adds 1

    def _pre_norms(self) -> list[Any]:
        blocks = self.hf.model.layers
        return [n for b in blocks for n in (b.input_layernorm, b.pre_feedforward_layernorm)]

    def _read(self, rows: torch.Tensor, half: int, space: str, weight: torch.Tensor) -> None:
        """``rows`` see ``weight @ (one-hot vector in space)``; overwrites what they saw of it."""
        rows[:, self.spaces[space]] = weight / self.height[space] * self._undo(half, space)

    def _read_all(self, rows: torch.Tensor, half: int, std: float) -> None:
        for space in self.spaces:
            shape = (len(rows), self._size(space))
            weight = std * torch.randn(shape, generator=self.random)
            height = CONSTANT if space == "constant" else 1.0
            rows[:, self.spaces[space]] = weight / height * self._undo(half, space)

    def _undo(self, half: int, space: str) -> torch.Tensor:
        """Divides the norm at half layer ``half`` out: the length of the stream there, and the gain."""
        gain = 1 + [*self._pre_norms(), self.hf.model.norm][half].weight
        length = sqrt(CONSTANT**2 + 2 + half)  # constant, position, content, what was written since
        return length / sqrt(len(gain)) / gain[self.spaces[space]]

    def _write_head(self, layer: int, head: int, space: str, weight: torch.Tensor) -> None:
        start = head * D_HEAD
        o_proj = self._layer(layer).self_attn.o_proj.weight
        o_proj[self.spaces[space], start : start + self.contents] = weight

    def _rows(self, layer: int, port: str, head: int, entries: slice) -> torch.Tensor:
        """Those of a projection that give some entries of a head; a view."""
        weight = getattr(self._layer(layer).self_attn, f"{port}_proj").weight
        return weight[head * D_HEAD : (head + 1) * D_HEAD][entries]

    def _entries(self, space: str) -> slice:
        """Slowly rotating entries of a query or key: the last of the first half."""
        middle = D_HEAD // 2 - self.contents
        assert middle - self.positions >= 2, "the first entries rotate fast"
        if space == "content":
            return slice(middle, D_HEAD // 2)
        return slice(middle - self.positions, middle)

    def _size(self, space: str) -> int:
        return self.spaces[space].stop - self.spaces[space].start

    def _layer(self, layer: int) -> Any:
        return self.hf.model.layers[layer]


def _strength(score: float) -> float:
    """Height of a query's and a key's entry that gives ``score``."""
    return sqrt(score * sqrt(QUERY_SCALAR))


def _blank(n_layers: int, width: int, vocabulary: int) -> Any:
    """A frozen ``Gemma2ForCausalLM`` of zeros."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    eager: dict[str, Any] = {"attn_implementation": "eager"}
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=D_MLP,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV,
        head_dim=D_HEAD,
        query_pre_attn_scalar=QUERY_SCALAR,
        attn_logit_softcapping=ATTENTION_CAP,
        final_logit_softcapping=LOGIT_CAP,
        rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e18},
        sliding_window=16,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **eager,
    )
    config.architectures = ["Gemma2ForCausalLM"]
    model = Gemma2ForCausalLM(config).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    return model
