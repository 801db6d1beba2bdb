"""Outrider's contract: what the agent, the server, the command line and step plugins share.

Importing this package loads nothing heavy; its modules are imported by those who need them.
"""

import os

__version__ = "0.1.0"

# gRPC's core writes lines of its own about failed handshakes to stderr, beside the sentence that we say. It
# reads this once, when grpc is imported, which is after this package in every program of ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
