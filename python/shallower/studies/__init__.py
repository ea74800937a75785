"""The stages joined: scans, evaluations, runs, curves, comparisons and sweeps."""
