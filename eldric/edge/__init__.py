"""The edge: where nodes that nobody can connect to have their addresses, and their way to the cluster."""
