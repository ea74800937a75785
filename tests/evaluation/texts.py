"""Texts of different lengths, of the words of the tests' tokenizer."""

TEXTS = [" ".join(f"w{(5 * i + 11 * j) % 97}" for j in range(2 + i % 9)) for i in range(17)]
