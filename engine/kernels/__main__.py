"""Compiles all kernels for the processor at hand, so that no stage waits: `python -m eldric.engine.kernels`."""

from eldric.engine.kernels.compiler import prepare

if __name__ == "__main__":
    print(f"kernels for {prepare(everything=True) or 'no extension of this processor: ggml multiplies'}")
