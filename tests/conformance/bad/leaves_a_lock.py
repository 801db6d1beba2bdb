"""It calls itself idempotent, and is in its own way once it was killed."""

from words import hook, program

LOCK = """lock = params["to"] + ".lock"
try:
    open(lock, "x").close()
except FileExistsError:
    tell("progress", error="another one is at work: " + lock, code="locked")
    sys.exit(1)
try:"""

outrider_step_types = hook(
    resolve=program(("\ntry:\n    with", f"\n{LOCK}\n    with"), ("finally:\n", "finally:\n    os.remove(lock)\n"))
)
