"""A module like any other."""
