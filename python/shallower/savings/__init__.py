"""One model's size and speed: counted, by a roofline, or timed; ``forecasts/gain.py`` compares."""
