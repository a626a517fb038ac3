"""Every public function that runs a model runs in bfloat16, and says what the float32 model says.

The reference is the float32 model with the *same* weights, those of the bfloat16 one.  What differs is
then the rounding of activations alone.  A bfloat16 number has 8 binary digits, a rounding error of
``2^-9`` at most; a block rounds about a dozen times on the way of its stream (norms, projections,
softmax, products, two additions), four blocks and the unembedding some 50 times.  Errors that all point
one way add up to

    ``R = 50 * 2^-9``, about a tenth,

of a result's own norm.  An exact effect is a difference of two metrics, each a difference of logits that
are rounded themselves: however small it is, it carries ``A = 2^-8`` of the metric's gap.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.calls import CALLS, Scene, bundled
from tests.support.compared import Keyed, check_close, compared

R, A = 50 * 2.0**-9, 2.0**-8
KINDS = {"hooked": torch.float32, "bridge": torch.bfloat16}
"""Model class to the type of the dictionaries beside a bfloat16 model."""


def rounded(scene: Scene) -> Scene:
    """A float32 scene with the weights of a bfloat16 one."""
    with torch.no_grad():
        for module in (scene.model, *scene.saes.values()):
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16().float()
    return scene


@pytest.fixture(scope="module")
def reference() -> Scene:
    return rounded(bundled("hooked"))


@pytest.fixture(scope="module", params=list(KINDS))
def half(request: pytest.FixtureRequest, reference: Scene) -> Scene:
    scene = bundled(request.param, torch.bfloat16, KINDS[request.param])
    # the same circuits are evaluated in both
    for name in ("circuit", "edge_circuit", "feature_circuit"):
        scene.results[name] = getattr(reference, name)
    return scene


@pytest.mark.parametrize("name", list(CALLS))
def test_bfloat16_says_what_float32_says(name: str, half: Scene, reference: Scene) -> None:
    got, expected = (answer(name, scene) for scene in (half, reference))
    check_close(name, got, expected, R, A)


def answer(name: str, scene: Scene) -> dict[str, Keyed]:
    """What a call gives, made once a scene."""
    return scene.once(f"answer {name}", lambda: compared(name, CALLS[name](scene)))
