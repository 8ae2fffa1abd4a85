"""Training data: shards of latents with their table, sample order, and batches."""
