"""Its program never says how far it is."""

from words import hook, program

outrider_step_types = hook(
    resolve=program(('            tell("progress", done=number, total=len(words), unit="words")\n', ""))
)
