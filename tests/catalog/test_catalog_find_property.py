"""Whatever a spec says of itself finds it again, alone and all together."""

from dataclasses import fields
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gemmascope_plugin.catalog import SaeSpec, find, tables

EVERYTHING = [spec for specs in tables.tables().values() for spec in specs]
NAMES = [field.name for field in fields(SaeSpec)]


def arguments(spec: SaeSpec, names: list[str]) -> dict[str, Any]:
    """Arguments of find() that this spec meets; it must be named if it is a canonical alias."""
    values = {name: getattr(spec, name) for name in names}
    if spec.release in tables.canonical_releases():
        values["release"] = spec.release
    if spec.layers and "site" in names:
        values["kind"] = spec.kind  # a site alone means dictionaries of one layer
    return {name: value for name, value in values.items() if value is not None}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EVERYTHING), st.lists(st.sampled_from(NAMES), unique=True))
def test_some_of_its_fields_find_a_spec(spec: SaeSpec, names: list[str]) -> None:
    assert spec in find(**arguments(spec, names))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EVERYTHING))
def test_all_of_its_fields_find_a_spec_alone(spec: SaeSpec) -> None:
    assert find(**arguments(spec, NAMES)).one() == spec


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(EVERYTHING))
def test_its_id_gets_a_spec(spec: SaeSpec) -> None:
    assert tables.get(spec.release, spec.sae_id) == spec
