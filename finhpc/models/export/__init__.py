"""What `finhpc export` writes: how each layer is converted, and the formats that other runtimes open.

A format is one file like `gguf_file.py`, with a subclass of `finhpc.models.export.runtime.Runtime`, and one row in
`finhpc.models.export.formats`.
"""
