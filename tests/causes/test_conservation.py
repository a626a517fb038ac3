"""What integrated gradients miss is said, and refused where it is not a number."""

from __future__ import annotations

import pytest

from gemmascope_plugin.causes.gradient.integrated import checked_share
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.frames import conservation_text


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, ""),
        ({"residual_max": 0.01}, ""),
        ({"residual_max": 0.124}, ", conservation off by 12 %: more steps"),
        ({"conservation": -0.3}, ", conservation off by 30 %: more steps"),
    ],
)
def test_what_is_missing_is_said(metadata: dict[str, float], text: str) -> None:
    assert conservation_text(metadata) == text


def test_what_is_not_finite_is_refused() -> None:
    assert checked_share(0.9) == 0.9
    with pytest.raises(TaskError, match="miss nan of the change.*not finite"):
        checked_share(float("nan"))
