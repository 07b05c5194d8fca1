"""Text to token shards (`text`), shards to a stream of batches (`shards`), records to packed examples (`examples`)."""
