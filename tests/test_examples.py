"""The examples of public names run and print what they say.

1. Code and output are those of the docstring. Outputs are compared word by word, so lines may be broken.
2. A number may differ by one unit of its last digit, as rounding differs between processors; counts above
   a hundred may differ by 2 %, as what is barely active does.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import re

import pytest

import gemmascope_plugin as gs

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NOTHING = 1e-5
"""Residuals below this are all the same."""


def same_number(actual: str, expected: str) -> bool:
    """Whether two numbers agree up to the last digit that is written."""
    x, y = float(actual), float(expected)
    if abs(x) < NOTHING and abs(y) < NOTHING:
        return True
    digits = len(expected.partition(".")[2].partition("e")[0])
    is_count = "." not in expected and abs(y) >= 100
    allowed = 0.02 * abs(y) if is_count else 1.01 * 10.0**-digits if digits else 0.0
    return abs(x - y) <= allowed


def same_output(actual: str, expected: str) -> bool:
    """Whether two outputs agree in all words and, up to rounding, in all numbers."""
    texts = [" ".join(text.split()) for text in (actual, expected)]
    if "".join(NUMBER.split(texts[0])) != "".join(NUMBER.split(texts[1])):
        return False
    pairs = zip(*(NUMBER.findall(text) for text in texts), strict=True)
    return all(same_number(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", gs.__all__)
def test_the_example_of_a_public_name(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(gs, name)) or "")
    assert examples, f"{name} has no example"
    names = {"gs": gs}
    for example in examples:
        if doctest.SKIP in example.options:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, name, "single"), names)
        assert same_output(printed.getvalue(), example.want), printed.getvalue()


def test_numbers_may_differ_by_rounding_only() -> None:
    assert same_output("a 0.331\n b", "a 0.33 b".replace("0.33", "0.331"))
    assert same_output("x 1.24", "x 1.25") and not same_output("x 1.24", "x 1.27")
    assert same_output("36510 edges", "36505 edges") and not same_output("7 edges", "8 edges")
    assert same_output("residual 2.1e-07", "residual 3.9e-08") and not same_output("a 1", "b 1")
