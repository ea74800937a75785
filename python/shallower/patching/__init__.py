"""Healing without training: the layer before a cut is solved anew, in closed form.

The last matrix of that layer's feed-forward writes into the residual stream. It is found
again by least squares, so that the stream jumps to where the dropped layers would have taken it,
x^(stop) of the whole model. No parameter is added, and the checkpoint stays standard.

Three methods: ``refit`` solves the matrix itself, from its own inputs, and the matrices after
the cut as well, as long as the loss on held-out text falls; ``map`` puts a D×D map behind it
(ReplaceMe, 2505.02819); ``magnitude`` only closes the gap between the norms (Prune&Comp,
2507.18212).
"""
