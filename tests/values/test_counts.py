"""Counts take the number of their noun."""

from shallower.values.counts import counted


def test_one_is_singular_and_thousands_are_parted():
    assert [counted(n, "text") for n in (0, 1, 2, 1024)] == [
        "0 texts", "1 text", "2 texts", "1,024 texts",
    ]  # fmt: skip
