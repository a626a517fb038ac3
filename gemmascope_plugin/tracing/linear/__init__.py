"""The model of one prompt made linear, and the sweep over it."""
