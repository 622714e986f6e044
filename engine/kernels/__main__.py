"""`python -m eldric.engine.kernels`: compile all kernels for the processor at hand, so that no stage waits for them.

With the name of a module and of an extension, write that module's machine code to standard output.
"""

import sys

from eldric.engine.kernels.compiler import compile_module, prepare
from eldric.engine.kernels.isa import ISAS


def main(arguments: list[str]) -> None:
    if arguments:
        module, isa = arguments
        sys.stdout.buffer.write(compile_module(module, ISAS[isa]))
    else:
        print(f"kernels for {prepare(everything=True) or 'no extension of this processor: ggml multiplies'}")


if __name__ == "__main__":
    main(sys.argv[1:])
