"""Instruction data: records, templates and chats to tokenized examples, and examples to packed batches."""
