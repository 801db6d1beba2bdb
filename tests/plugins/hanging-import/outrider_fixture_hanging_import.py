"""It waits in the system for what never comes."""

import os

reader, _writer = os.pipe()
os.read(reader, 1)
