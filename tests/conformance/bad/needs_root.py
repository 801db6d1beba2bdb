"""Its program wants to be root, which no step is."""

from words import hook, program

outrider_step_types = hook(resolve=program(("words = open", "os.setuid(0)\nwords = open")))
