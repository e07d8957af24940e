"""A number with its noun, for people: the one place that forms plurals and separates thousands."""


def count(number: float, what: str) -> str:
    """Return `1 step`, `12,000 steps`; `number` is rounded to a whole one, `what` is the noun in the singular."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"
