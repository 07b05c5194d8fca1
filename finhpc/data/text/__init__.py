"""Raw text to token ids: sources, file formats, tokenizers, and packing into shards."""
