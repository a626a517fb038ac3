"""Dictionary and stream on different devices; models that ``torch.compile`` has changed.

Without a GPU, devices are checked on fake tensors, which have a device and no values. That covers edits
with the error kept. What looks for active features (``nonzero``: a dropped or detached error, listeners,
edits of every feature) depends on values and cannot run there, nor can gradients, for which torch wants
a real device. Those run where there is a GPU.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from gemmascope_plugin.splice import Add, Clamp, HookedSAE, Project, Scale, splice
from gemmascope_plugin.splice.window import Window
from tests import factories
from tests.factories import n_hooks, random_sae, tiny_tokenizer
from tests.tiny_models import gemma2

SITE = "blocks.1.hook_resid_post"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EDITS = {
    "none": [],
    "add": [Add(features=3, amount=2.0)],
    "clamp": [Clamp(features=[1, 2], value=[1.0, 2.0], positions=[3, -2])],
    "tensor": [Scale(features=[1, 2], factor=torch.tensor([1.0, 2.0]))],
    "all": [Scale(features=None, factor=2.0)],
    "projection": [Project(features=3, factor=0.0)],
}


# --------------------------------------------------------------------------- devices
def hooked_on(device: str, kind: str, **options: Any) -> HookedSAE:
    hooks = {
        "sae": (SITE,),
        "transcoder": ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
    }
    sae = random_sae(32, 96, *hooks[kind], d_out=32)
    for name, parameter in list(sae.named_parameters()):
        moved = torch.empty(parameter.shape, device=device)
        setattr(sae, name, torch.nn.Parameter(moved, requires_grad=False))
    return HookedSAE(sae, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("edits", ["none", "add", "clamp"])
def test_edits_reach_a_stream_on_another_device(edits: str, kind: str) -> None:
    with FakeTensorMode():
        hooked = hooked_on("cpu", kind)
        x, y = (torch.empty(2, 6, 32, device="cuda") for _ in range(2))
        keep = torch.ones(2, 6, dtype=torch.bool, device="cuda")
        # in the middle of a text, where nobody asks whether any token is left, which is a value
        window = Window(keep, start=2, prompt=4)
        bound = [edit.bind(SITE, 96) for edit in EDITS[edits]]
        out = hooked.write(y, hooked.read(y if kind == "sae" else x, window, bound))
        assert out.device == y.device
        assert out.dtype == y.dtype


@torch.no_grad()
def test_what_depends_on_values_cannot_be_faked() -> None:
    """Should this ever fail, the test above can take these modes in."""
    with FakeTensorMode():
        hooked, y = hooked_on("cpu", "sae", error="drop"), torch.empty(1, 6, 32, device="cuda")
        keep = torch.ones(1, 6, dtype=torch.bool, device="cuda")
        with pytest.raises(DynamicOutputShapeException):
            hooked.write(y, hooked.read(y, Window(keep, start=2, prompt=4)))


@GPU
@pytest.mark.parametrize("where", [("cuda", "cpu"), ("cpu", "cuda")], ids=["to cpu", "to cuda"])
@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
@pytest.mark.parametrize("site", ["residual", "transcoder"])
def test_values_do_not_depend_on_the_device(
    hooked2, site: str, error: Any, edits: str, where
) -> None:
    stream, home = where
    sae = getattr(factories, site)(hooked2, 1)
    x, y = torch.randn(2, 2, 6, 32, generator=torch.Generator().manual_seed(0))
    y = x if site == "residual" else y
    keep = torch.ones(2, 6, dtype=torch.bool)
    expected = HookedSAE(sae, error=error)(x, y, keep, EDITS[edits])
    moved = HookedSAE(copy.deepcopy(sae).to(home), error=error)
    got = moved(x.to(stream), y.to(stream), keep.to(stream), EDITS[edits])
    assert got.device.type == stream
    assert torch.allclose(got.detach().cpu(), expected.detach(), atol=1e-4)


# --------------------------------------------------------------------------- compiled models
@pytest.fixture(params=["hooked", "bridge"])
def fresh_model(request: pytest.FixtureRequest) -> Any:
    """A model that a test may compile, of one layer: tracing takes long."""
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[request.param]
    return build(gemma2(num_hidden_layers=1), tiny_tokenizer(), "tiny")


@pytest.fixture
def sae(hooked2) -> Any:
    """A dictionary at the only layer."""
    return factories.residual(hooked2, 0)


def compiled_object(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_block(model: Any) -> Any:
    model.blocks[0].compile(backend="eager")
    return model


def compiled_block_object(model: Any) -> Any:
    model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
    return model


REFUSED = {
    compiled_object: "The model was compiled, hooks in it would not run",
    compiled_in_place: "The model was compiled, hooks in it would not run",
    compiled_block: "'blocks.0' was compiled, hooks in it would not run",
    compiled_block_object: "was compiled, hooks in it would not run",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_compiled_model_is_refused(fresh_model, sae, change) -> None:
    before = n_hooks(fresh_model)
    model = change(fresh_model)
    with (
        pytest.raises(ModelError, match=f"{REFUSED[change]}.*as it was before torch.compile"),
        splice(model, sae),
    ):
        pass
    assert n_hooks(fresh_model) == before


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Case and model class to what came of it, see ``compiled_cases.py``."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.splice.compiled_cases"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


INSIDE = ["inside_object hooked", "inside_block hooked", "inside_object bridge"]


@pytest.mark.parametrize("case", INSIDE)
def test_compiling_inside_the_block_is_an_error(outcomes, case: str) -> None:
    assert outcomes[case] == "ModelError"


@pytest.mark.parametrize("case", ["object_run_before hooked", "function_run_before hooked"])
def test_what_was_compiled_before_the_block_is_never_silently_bare(outcomes, case: str) -> None:
    """Code traced before has no dictionary in it: an error, or the right values."""
    assert outcomes[case] in ("ModelError", "HookNotFiredError", "edited")


@pytest.mark.parametrize("case", ["object_after_the_block", "function_after_the_block"])
def test_compiled_code_has_nothing_of_the_splice_after_the_block(outcomes, case: str) -> None:
    assert outcomes[f"{case} hooked"] == "bare"
