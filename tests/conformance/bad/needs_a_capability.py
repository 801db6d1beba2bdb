"""Its program gives a file to somebody else, which takes CAP_CHOWN."""

from words import hook, program

outrider_step_types = hook(resolve=program(("words = open", 'os.chown(params["of"], 1, 1)\nwords = open')))
