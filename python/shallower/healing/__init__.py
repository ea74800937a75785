"""Healing a cut by training low-rank adapters (QLoRA), as appendix A of 2403.17887 does."""
