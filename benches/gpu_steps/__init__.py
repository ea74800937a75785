"""The steps of gpu_check.py, each a function from the setting to its figures."""
