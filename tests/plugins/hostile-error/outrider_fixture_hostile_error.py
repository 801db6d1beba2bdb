"""Its exception can't even be shown."""


class Hostile(Exception):
    def __str__(self) -> str:
        raise SystemExit("even this")


raise Hostile
