"""The stages joined on models and texts: scans, evaluations, runs, curves and comparisons."""
