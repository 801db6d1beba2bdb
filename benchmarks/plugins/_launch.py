"""Start one command, wait for it, and write what it used as JSON to the descriptor given first.

A process of its own, and a small one: what a program needs at its peak, as the kernel tells it, includes what its
parent had when it was started, and a benchmark that has read a gibibyte would say so of every `curl`. Python without
`site` is 9 MiB, and that is the least that can be measured. Standard library, and as little of it as possible.
"""

import os
import sys
import time

descriptor, command = int(sys.argv[1]), sys.argv[2:]
started = time.perf_counter()
try:
    pid = os.posix_spawnp(command[0], command, os.environ)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
_, status, used = os.wait4(pid, 0)
wall = time.perf_counter() - started
# ru_maxrss is the greatest of any one process of the tree, in KiB; the times are the sum of all that were waited for.
os.write(
    descriptor,
    b'{"code": %d, "wall_s": %f, "cpu_s": %f, "peak_bytes": %d}'
    % (os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024),
)
