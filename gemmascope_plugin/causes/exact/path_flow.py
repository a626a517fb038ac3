"""How the streams that receivers read differ when a set of senders changes.

``paths`` says what may carry the change from the senders to a receiver:

``direct``  nothing: every other head and MLP is frozen at its value in the base run. The difference is
            closed form. Embedding and MLPs: other minus base. The heads of a layer, *jointly*:
            ``ln1_post(a + sum_h dr_h) - ln1_post(a)`` with ``dr_h = (z'_h - z_h) W_O[h]``, which is not
            a sum over heads where a norm follows attention, as in Gemma.
``mlps``    MLPs in between are recomputed, heads are frozen (Wang et al., arXiv 2211.00593).
``total``   everything in between is recomputed.

Of a stream that is a sender all that was written before it is sent, senders before it included.

Cost: ``direct`` a few products; the others one forward pass with a copy of the prompts per set, from the
lowest layer of the senders and the first position that differs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float

from gemmascope_plugin.causes.components import is_stream, is_z, layer_of, stream_time
from gemmascope_plugin.causes.exact.path_changes import Change
from gemmascope_plugin.causes.replayed import Part
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import dtype_of, wide
from gemmascope_plugin.models.record import keeping, write
from gemmascope_plugin.models.replay_points import Entry

Paths = Literal["direct", "mlps", "total"]
Difference = Float[torch.Tensor, "prompt pos d_model"]


def read_by_flow(
    anatomy: Anatomy, replaced: set[str], added: set[str], streams: Sequence[str], paths: Paths
) -> tuple[list[str], list[str]]:
    """Hooks whose activation a flow needs, of the run that is patched and of the other.

    ``replaced`` are hooks at which any change takes the other run's value, ``added`` those at
    which any adds something.
    """
    here = replaced | {hook for hook in added if is_z(hook)}
    if paths != "direct":
        here = here | set(streams)
    if paths == "mlps":
        here = here | {f"blocks.{layer}.attn.hook_z" for layer in range(anatomy.n_layers)}
    return sorted(here), sorted(replaced)


class Flow:
    """How changes travel in the base run of a part."""

    def __init__(self, anatomy: Anatomy, part: Part, window: slice, paths: Paths) -> None:
        self._anatomy, self._part, self._window, self._paths = anatomy, part, window, paths
        self._base_acts, self._other_acts = part.base_acts, part.other_acts

    def differences(
        self, changes: Sequence[Change], streams: Sequence[str]
    ) -> list[dict[str, Difference]]:
        """For each change, hook of a stream to the difference there."""
        if self._paths == "direct":
            return [{hook: self._direct(change, hook) for hook in streams} for change in changes]
        return self._recomputed(changes, streams)

    def _direct(self, change: Change, stream: str) -> Difference:
        """With everything else frozen."""
        until = stream_time(stream)
        whole = [h for h in change.replaced if is_stream(h) and stream_time(h) <= until]
        start = max(whole, key=stream_time, default=None)
        since = -2 if start is None else stream_time(start)
        difference = self._zero()
        if start is not None:
            difference = wide(self._other_acts[start]) - wide(self._base_acts[start])
        hooks = {*change.replaced, *change.added}
        for hook in sorted(h for h in hooks if since < stream_time(h) <= until):
            step = self._attention(change, hook) if is_z(hook) else self._added(change, hook)
            difference = difference + step.to(difference)
        return difference

    def _zero(self) -> Difference:
        model = self._anatomy.model
        tokens = self._part.replay.tokens
        shape = (*tokens.shape, self._anatomy.d_model)
        return wide(torch.zeros(shape, device=tokens.device, dtype=dtype_of(model)))

    def _added(self, change: Change, hook: str) -> torch.Tensor:
        """What the tensor at a hook changes by."""
        fixed = change.added.get(hook)
        if hook not in change.replaced:
            assert fixed is not None
            return fixed
        heads = change.replaced[hook]
        step = wide(self._other_acts[hook]) - wide(self._base_acts[hook])
        if heads is not None:
            others = [h for h in range(step.shape[2]) if h not in heads]
            step[:, :, others] = 0
        return step if fixed is None else step + fixed

    def _attention(self, change: Change, hook: str) -> Difference:
        """What the heads of a layer change together, after the norm."""
        layer, z = layer_of(hook), self._base_acts[hook]
        dz = wide(self._added(change, hook)).to(z.device)
        post = self._anatomy.norm(layer, "ln1_post")
        a, da = self._anatomy.head_sum(layer, z), self._anatomy.head_sum(layer, dz)
        # its bias is in both
        da = da - self._anatomy.head_sum(layer, torch.zeros_like(dz))
        return da if post is None else post(a + da) - post(a)

    @torch.no_grad()
    def _recomputed(
        self, changes: Sequence[Change], streams: Sequence[str]
    ) -> list[dict[str, Difference]]:
        """Runs the prompts once per change, side by side, and reads the streams."""
        replay, window, n = self._part.replay, self._window, len(self._part.index)
        first = min(layer_of(hook) for c in changes for hook in (*c.replaced, *c.added))
        hooks: dict[str, list[Callable[[torch.Tensor], None]]] = {}
        values: dict[str, torch.Tensor] = {}
        if self._paths == "mlps":
            for layer in range(max(0, first), self._anatomy.n_layers):
                name = f"blocks.{layer}.attn.hook_z"
                values[name] = self._base_acts[name][:, window].repeat(len(changes), 1, 1, 1)
                hooks[name] = [_freeze(values[name])]
        for j, change in enumerate(changes):
            rows = slice(j * n, (j + 1) * n)
            for name in change.replaced:
                hooks.setdefault(name, []).append(self._replace(name, change.replaced[name], rows))
            for name, value in change.added.items():
                # the two model classes disagree about what is returned from the middle of a layer
                place = name.replace("hook_resid_mid", "hook_attn_out")
                hooks.setdefault(place, []).append(_add(value[:, window], rows))
        edits = [(name, _clone_and(edit)) for name, edit in hooks.items()]
        acts: dict[str, torch.Tensor] = {}
        layer = 0 if replay.runs_whole else max(0, first)
        hooked = [*edits, *keeping(acts, streams)]
        replay.run(Entry(layer, copies=len(changes), hooks=hooked, values=values), window)
        return [
            {hook: self._placed(x[j * n : (j + 1) * n], hook) for hook, x in acts.items()}
            for j in range(len(changes))
        ]

    def _placed(self, x: Float[torch.Tensor, "prompt some d_model"], hook: str) -> Difference:
        """How a stream differs at all positions, from what it is at those that ran."""
        whole = self._zero()
        whole[:, self._window] = wide(x) - wide(self._base_acts[hook][:, self._window])
        return whole

    def _replace(
        self, name: str, heads: tuple[int, ...] | None, rows: slice
    ) -> Callable[[torch.Tensor], None]:
        value = self._other_acts[name][:, self._window]

        def edit(x: torch.Tensor) -> None:
            if heads is None:
                x[rows] = value
            else:
                index = list(heads)
                x[rows, :, index] = value[:, :, index]

        return edit


def _freeze(value: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def edit(x: torch.Tensor) -> None:
        x.copy_(value)

    return edit


def _add(value: torch.Tensor, rows: slice) -> Callable[[torch.Tensor], None]:
    def edit(x: torch.Tensor) -> None:
        x[rows] += value.to(x)

    return edit


def _clone_and(edits: list[Callable[[torch.Tensor], None]]) -> Callable[..., torch.Tensor]:
    """A hook function that edits a copy."""

    def edited(x: torch.Tensor) -> torch.Tensor:
        copy = x.clone()
        for edit in edits:
            edit(copy)
        return copy

    return write(edited)
