"""Its program goes on for a while after what it writes is there whole."""

from words import hook, program

PUBLISH = '    os.replace(staged, params["to"])\n'
WAIT = '    print("published", flush=True)\n    time.sleep(4 * params["pause_s"])\n'

outrider_step_types = hook(resolve=program((PUBLISH, PUBLISH + WAIT)))
