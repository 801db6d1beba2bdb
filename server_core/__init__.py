"""Outrider's server: what is known of nodes, objects, envs, runs, logs and events, and the two gRPC services."""
