"""The divergence from the whole model on its own words as a judge."""

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from ...errors import TextsError
from ...texts.batches import padded
from ...values.answers import Answer
from ...values.hashing import hash_of
from ...values.tokens import Tokens
from .judge import KLJudge, looks


class SpeechJudge(KLJudge):
    """KL(p ‖ q) on the whole model's answers, p its next-token distribution and q that of the cut.

    An item is a prompt with its answers in ``said``, weighted by their tokens.
    """

    name = "speech"

    def __init__(self, said: Sequence[Sequence[Answer]], *, tokens: Tokens) -> None:
        if not said:
            raise TextsError("there are no prompts that a cut could be judged on")
        batches = []
        for look in looks(len(said), max(1, tokens.texts // len(said[0]))):
            numbered = range(look.start, look.stop)
            rows = [(index, answer) for index in numbered for answer in said[index]]
            ids = [(index, np.array(one.ids, np.int64)) for index, one in rows]
            batches.append(padded(ids, np.array([len(one.given) for _, one in rows])))
        super().__init__(batches)
        self.content = hash_of([[astuple(one) for one in answers] for answers in said])
