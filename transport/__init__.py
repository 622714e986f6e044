"""Moves frames between the stages of a pipeline. Knows no models."""

if __name__ != "eldric.transport":
    raise ImportError("import this package as eldric.transport, so that each class exists once")
