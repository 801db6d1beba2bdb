"""Container runtimes: the protocol in `base`, drivers beside it, chosen by name (group `outrider.runtimes`)."""
