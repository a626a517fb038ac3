"""``python -m gemmascope_plugin`` is the ``gemmascope`` program."""

from __future__ import annotations

from gemmascope_plugin.cli import main

if __name__ == "__main__":
    main()
