"""The adjoint sweep: rows of a transcoder attribution graph, without an autograd graph."""
