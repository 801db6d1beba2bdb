"""It works before it is asked to: an import that does not end."""

import time

while True:
    time.sleep(0.01)
