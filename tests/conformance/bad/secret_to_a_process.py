"""Its program gives a secret to another one as an argument: the node's process list has it."""

from words import hook, program

LINES = """token = os.environ.get("WORDS_TOKEN")
if token:
    import subprocess
    subprocess.run(["python3", "-c", "import time; time.sleep(0.5)", token])
words = open"""

outrider_step_types = hook(resolve=program(("words = open", LINES)))
