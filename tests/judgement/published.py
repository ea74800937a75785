"""Choices that papers have published for models too large for this suite, 0-based.

``test_criteria_published.py`` says by which command they are checked where the models are.
"""

L_STAR = {
    "Llama-2-7b-hf": (32, [
        23, 24, 23, 23, 23, 22, 22, 21, 20, 19, 18, 18, 17, 16, 15, 8, 8, 7, 4, 4, 4, 2, 2, 2,
    ]),
    "Llama-2-13b-hf": (40, [
        33, 32, 31, 30, 29, 28, 27, 27, 27, 26, 25, 24, 24, 23, 22, 22, 20, 19, 18, 18, 17, 17, 15,
        3, 3, 3, 3, 3, 3, 3, 3, 3,
    ]),
    "Mistral-7B-v0.1": (32, [
        26, 24, 23, 23, 23, 22, 21, 21, 20, 20, 19, 17, 17, 16, 13, 13, 11, 8, 8, 6, 6, 5, 4, 3,
    ]),
    "Llama-2-70b-hf": (80, [
        62, 62, 61, 62, 61, 60, 61, 58, 59, 58, 58, 57, 56, 55, 54, 53, 53, 53, 53, 53, 51, 50, 49,
        50, 49, 49, 48, 48, 46, 46, 45, 44, 43, 42, 41, 40, 39, 37, 35, 35, 33, 33, 29, 30, 29, 28,
        28, 28, 26, 25, 23, 22, 22, 21, 20, 19, 19, 18, 16, 16, 14, 14, 13, 10,
    ]),
}  # fmt: skip
"""Layers of a model, and the first layer of the best block of n = 1, 2, … by ``angular``:
2403.17887, 10,000 samples of C4's validation split, 4 bits."""

BLOCK_INFLUENCE = {
    "Llama-2-7b-hf": (32, [27, 26, 25, 28, 24, 29, 23, 21, 22]),
    "Llama-2-13b-hf": (40, [33, 31, 32, 30, 29, 34, 28, 35, 27, 26]),
}
"""Layers of a model, and the order in which ``block_influence`` drops them (2403.03853)."""
