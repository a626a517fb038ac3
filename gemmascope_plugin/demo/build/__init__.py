"""Trains the bundled suite: ``python -m gemmascope_plugin.demo.build``."""
