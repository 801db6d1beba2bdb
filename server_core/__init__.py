"""The server: node and control services, dispatch, store, bus and security."""
