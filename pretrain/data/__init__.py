"""One road for data: raw files to packed shards to clips."""
