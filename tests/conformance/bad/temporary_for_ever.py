"""Its program asks to be tried again though nothing will have changed."""

from words import hook, program

outrider_step_types = hook(resolve=program(("sys.exit(1)", "sys.exit(75)")))
