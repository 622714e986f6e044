"""The eldric-cli command."""

if __name__ != "eldric.cli":
    raise ImportError("import this package as eldric.cli, so that each class exists once")
