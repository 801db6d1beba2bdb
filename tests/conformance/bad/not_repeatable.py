"""It calls itself idempotent, and refuses to do again what it has done."""

from words import hook, program

LINES = """if os.path.exists(params["to"]):
    tell("progress", error=params["to"] + " is there already", code="exists")
    sys.exit(1)
words = open"""

outrider_step_types = hook(resolve=program(("words = open", LINES)))
