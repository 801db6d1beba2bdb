"""What it says would steer a terminal, and could not be sent."""

raise RuntimeError("\x1b[2J\ud800 boom\n" * 1000)
