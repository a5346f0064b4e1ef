"""The training loop, its objectives and the entry points. May import data and ernie_model."""
