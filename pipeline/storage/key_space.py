"""Names in the middle between two keys, as if keys were numbers whose digits are the letters that keys have.

Strings are compared by code point, as S3 orders keys: UTF-8 keeps that order. Pure functions.
"""

from bisect import bisect_left

_MOST_LETTERS = 64
"""Letters of a key, after what two keys have in common, that count."""


def split_point(low: str, high: str | None, *, prefix: str, letters: str) -> str | None:
    """Return a short name between two keys, about in the middle, or None if there is none.

    `high` is None for the end of all keys that start with `prefix`, as `low` does. `letters` are those to make names
    of, sorted; a name begins as `low` does and goes on with them.
    """
    skip, length, base = _scale(low, high, prefix, letters)
    middle = (_value(low, skip, length, letters) + _high(high, skip, length, letters)) // 2
    digits = [(middle // base ** (length - 1 - place)) % base for place in range(length)]
    name = low[:skip]
    for digit in digits:
        if digit == 0 or not letters:
            return None
        name += letters[min(digit, len(letters)) - 1]
        if low < name and (high is None or name < high):
            return name
    return None


def pages_left(before: str, last: str, high: str | None, *, prefix: str, letters: str) -> float:
    """Return about how many pages lie between `last` and `high`, where the latest page went from `before` to `last`."""
    skip, length, _ = _scale(before, high, prefix, letters)
    values = [_value(key, skip, length, letters) for key in (before, last)]
    return (_high(high, skip, length, letters) - values[1]) / max(1, values[1] - values[0])


def _scale(low: str, high: str | None, prefix: str, letters: str) -> tuple[int, int, int]:
    """Return the number of letters to skip, of those that count, and the base of their digits."""
    skip = len(prefix) if high is None else _num_common(low, high)
    return skip, min(_MOST_LETTERS, max(1, len(low) - skip) + 2), len(letters) + 2


def _num_common(one: str, other: str) -> int:
    """Return how many letters two keys begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _value(key: str, skip: int, length: int, letters: str) -> int:
    """Digits: 0 past the end of a key, else 1 to len(letters) + 1, by the first letter that is not lower."""
    value = 0
    for letter in key[skip : skip + length]:
        value = value * (len(letters) + 2) + bisect_left(letters, letter) + 1
    return value * (len(letters) + 2) ** max(0, length - max(0, len(key) - skip))


def _high(key: str | None, skip: int, length: int, letters: str) -> int:
    return (len(letters) + 2) ** length - 1 if key is None else _value(key, skip, length, letters)
