"""The values of IQ4_NL and IQ4_XS: nibbles are numbers of these (`kvalues_iq4nl`, ggml-common.h of ggml 0.26)."""

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: The same as unsigned bytes.
BIAS = 127
TABLE = tuple(value + BIAS for value in VALUES)
