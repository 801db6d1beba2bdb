"""Its program fails with a traceback."""

from words import hook, program

outrider_step_types = hook(resolve=program(('if not os.path.isfile(params["of"]):', "if False:")))
