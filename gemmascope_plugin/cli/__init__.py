"""The ``gemmascope`` program: thin commands over the floors below."""

from __future__ import annotations


def main() -> None:
    """Run the program and exit."""
    from gemmascope_plugin.cli.app import app

    app(prog_name="gemmascope")
