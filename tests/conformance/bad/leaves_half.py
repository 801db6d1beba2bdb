"""Its program writes where others look before it is finished."""

from words import hook, program

outrider_step_types = hook(
    resolve=program(('params["to"] + ".part"', 'params["to"]'), ("    if os.path.exists(staged):", "    if False:"))
)
