"""Computes: a model's shard, token ids or hidden states in, hidden states or tokens out. Knows no network."""

if __name__ != "eldric.engine":
    raise ImportError("import this package as eldric.engine, so that each class exists once")
