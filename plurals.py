"""How a number of things is said."""


def count(n: int, noun: str, plural: str | None = None) -> str:
    """`1 slide`, `2 slides`, `12,345 slides`.

    Args:
        n: How many.
        noun: One of them.
        plural: Several of them; None for the noun with an s.
    """
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"
