"""Token shards on disk: their manifest, the order of samples, and the stream that a replica trains on."""
