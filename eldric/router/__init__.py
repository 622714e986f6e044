"""The router: the OpenAI-compatible face of a cluster."""
