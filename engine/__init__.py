"""Computes: reads a model's shard and turns token ids or hidden states into hidden states or tokens. Knows no network."""

if __name__ != "eldric.engine":
    raise ImportError("import this package as eldric.engine, so that each class exists once")
