"""It ends the process that imports it, as a script would."""

import sys

sys.exit(3)
