"""Its program tells what is left in place of what is done."""

from words import hook, program

outrider_step_types = hook(resolve=program(("done=number,", "done=len(words) - number,")))
