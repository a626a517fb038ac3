"""Tables of methods: names as the signatures have them, options of others refused with their takers."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from gemmascope_plugin.causes.gradient import attribution_patching as nodes
from gemmascope_plugin.causes.gradient import edge_attribution as edges
from gemmascope_plugin.causes.gradient import site_runs as sites
from gemmascope_plugin.causes.gradient.relp import RelpRules
from gemmascope_plugin.causes.method import pick
from gemmascope_plugin.errors import TaskError, UnknownNameError

TABLES: list[Any] = [nodes.METHODS, edges.METHODS, sites.METHODS]


def test_the_tables_have_the_names_of_the_signatures() -> None:
    assert set(nodes.METHODS) == set(get_args(nodes.NodeMethodName))
    assert set(edges.METHODS) == set(get_args(edges.EdgeMethodName))


@pytest.mark.parametrize("table", TABLES)
def test_every_method_says_what_it_is(table) -> None:
    for name, method in table.items():
        assert method.name == name
        assert method.title and method.paper and method.cost


@pytest.mark.parametrize("table", TABLES)
def test_an_option_of_another_method_is_refused_with_those_that_take_it(table) -> None:
    values = {"steps": 3, "rules": RelpRules()}
    options = {option for method in table.values() for option in method.options()}
    for name, method in table.items():
        for option in options - set(method.options()):
            takers = [other for other, m in table.items() if option in m.options()]
            with pytest.raises(TaskError) as error:
                pick(table, name, **{option: values[option]})
            assert f"{option} plays no part in method={name!r}" in str(error.value)
            assert all(repr(taker) in str(error.value) for taker in takers)
            assert f'Try: method="{takers[0]}", or without {option}=' in str(error.value)


def test_what_is_not_given_is_the_default() -> None:
    assert pick(nodes.METHODS, "ig", steps=None, rules=None).steps == 10
    assert pick(nodes.METHODS, "ig", steps=3).steps == 3
    with pytest.raises(UnknownNameError, match="Unknown method 'atp\\+'.*Did you mean"):
        pick(nodes.METHODS, "atp+")
