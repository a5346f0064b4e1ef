"""How a model and its training state lie on several processes."""
