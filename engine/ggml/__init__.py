"""ggml as a backend: binding, weights, graphs and KV cache."""
