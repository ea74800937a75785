"""The divergence between rows of next-token distributions."""

import torch


def divergence_terms(
    log_p: torch.Tensor, log_q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms of KL(p ‖ q), and p and q, from normalised (R, V) logits, which are overwritten.

    A term is p (log p - log q) + q - p, so that rounding cancels: equal logits give 0 exactly.
    """
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0)
    q = log_q.exp_()
    return terms.add_(q).sub_(p), p, q
