"""A count with its noun, in the number that it takes."""


def counted(count: int, noun: str, many: str | None = None) -> str:
    """``1 layer``, ``4 layers``, ``1,024 tokens``; ``2 passes`` by the word for many."""
    return f"{count:,} {noun if count == 1 else many or f'{noun}s'}"
