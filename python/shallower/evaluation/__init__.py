"""Measures of a model: loss, perplexity, speech, and tasks of lm-eval."""
