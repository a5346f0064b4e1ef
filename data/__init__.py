"""Raw records to packed batches. May import ernie_model, never train."""
