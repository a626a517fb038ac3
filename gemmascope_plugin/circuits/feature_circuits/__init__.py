"""Circuits of features of dictionaries, their errors, heads and MLPs: found, joined, evaluated."""
