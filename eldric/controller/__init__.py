"""The controller: registry, planner and deployments of a cluster."""
