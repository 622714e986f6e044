"""The data worker: the model store."""
