"""Effects by running the model with something replaced."""
