"""Text on disk -> token shards (`prepare`) -> ordered streams of micro-batches (`reading`; over Ray Data: `stream`)."""
