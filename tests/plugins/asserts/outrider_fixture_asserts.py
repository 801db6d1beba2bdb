"""It asserts what is not so."""

assert False, "never"
