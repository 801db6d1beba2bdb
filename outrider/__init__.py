"""Outrider's contract: what the agent, the server, the command line and step plugins share.

Importing this package loads nothing else; its modules are imported by those who need them.
"""

__version__ = "0.1.0"
