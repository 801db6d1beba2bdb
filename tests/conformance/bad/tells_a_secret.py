"""Its program prints what it was trusted with."""

from words import hook, program

outrider_step_types = hook(
    resolve=program(("words = open", 'print("token is", os.environ.get("WORDS_TOKEN", "-"))\nwords = open'))
)
