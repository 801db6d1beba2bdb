"""Its program does not hear that it is to end."""

from words import hook, program

outrider_step_types = hook(resolve=program(("raise SystemExit(143)", "pass")))
