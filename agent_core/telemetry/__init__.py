"""What the agent says of its node: facts at registration, a brief state with every heartbeat."""
