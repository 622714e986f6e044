"""The worker: holds stages of pipelines and computes their steps."""
