"""Its program gives back what its outputs model does not have."""

from words import hook, program

outrider_step_types = hook(resolve=program(("words=len(words))", "words=len(words), lines=1)")))
