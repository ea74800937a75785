"""A count with its noun, in the number that it takes."""


def counted(count: int, noun: str) -> str:
    """``1 layer``, ``4 layers``, ``1,024 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
