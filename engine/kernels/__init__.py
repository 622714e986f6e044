"""Kernels of the engine's own, above all for matrices that are quantized in blocks: written as LLVM IR, compiled for
the processor at hand.

A matrix is packed into *panels*: as many of its rows as a vector has 32-bit lanes, interleaved, so that one
instruction multiplies four values of each with four values of a row of activations, and no sum runs across lanes. What
an activation row gets depends on itself and the matrix alone: not on the rows beside it, the threads or the vector
width. So every product is exact in the sense of exact mode.
"""
