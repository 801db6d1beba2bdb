"""It raises what Ctrl-C raises."""

raise KeyboardInterrupt
