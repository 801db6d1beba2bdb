"""Its program writes where the sandbox lets nobody write."""

from words import hook, program

outrider_step_types = hook(resolve=program(("words = open", 'open("/var/words", "w").close()\nwords = open')))
