"""It has a step type under a hook whose name is misspelt."""

from words import hook

outrider_step_type = hook()
