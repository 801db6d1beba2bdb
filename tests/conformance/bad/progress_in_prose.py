"""Its program tells how far it is in words of its own."""

from words import hook, program

outrider_step_types = hook(
    resolve=program(('done=number, total=len(words), unit="words"', 'done=f"{number} of {len(words)} words"'))
)
