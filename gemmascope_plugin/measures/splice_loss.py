"""The next-token loss of a model with a dictionary over a corpus, beside two ways of removing its site.

What the losses are is in ``splice/losses.py``. All are read and changed at the tokens of the corpus that
are not excluded.

Cost: a forward pass over the corpus and three more from the layer of the dictionary on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.features.stream import Corpus
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.next_token_losses import NextTokenLosses
from gemmascope_plugin.models.points import lowest_layer
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice import HookedSAE, splice
from gemmascope_plugin.splice.losses import SpliceLoss, mean_losses, putting


def splice_loss(
    model: HookedModel, hooked: HookedSAE, text: Corpus, mean: Float[torch.Tensor, " d_out"]
) -> SpliceLoss:
    """The losses of a dictionary whose error is dropped; ``mean`` is that of its output site."""
    assert hooked.error == "drop", "the reconstruction alone must flow"

    def passes(
        read: NextTokenLosses, tokens: Int[torch.Tensor, "batch pos"]
    ) -> Iterator[tuple[str, Float[torch.Tensor, " read"]]]:
        yield "clean", read(model)
        with splice(model, hooked) as run:
            yield "spliced", read(run)
        for name, value in (("zeroed", torch.zeros_like(mean)), ("mean-ablated", mean)):
            hook_fn = putting(text.kept(tokens), value)
            with hooking(model, fwd_hooks=[(hooked.hook_out, hook_fn)]):
                yield name, read(model)

    batches = ((tokens, text.readable(tokens)) for tokens in text.batches)
    layer = lowest_layer(hooked.hook_in, hooked.hook_out)
    means = mean_losses(model, batches, layer, passes)
    return SpliceLoss(**{name.replace("-", "_"): value for name, value in means.items()})
