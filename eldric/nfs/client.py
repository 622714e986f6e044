"""The FUSE client as a process of a worker's: python -m eldric.nfs.client nfs://HOST[:PORT]/PATH FOLDER."""

import sys
from pathlib import Path

from eldric.errors import EldricError
from eldric.nfs.address import NfsAddress


def main(arguments: list[str]) -> int:
    """Returns the exit code; says what went wrong in one line on stderr."""
    try:
        from eldric.nfs.fuse import serve

        serve(NfsAddress.parse(arguments[0]), Path(arguments[1]), private=True)
    except (EldricError, OSError) as error:  # OSError: there is no libfuse
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
