"""Classes for SAELens to train, one file each, and what their steps share."""
