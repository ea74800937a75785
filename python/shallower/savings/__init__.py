"""What a cut saves: counted, forecast, timed."""
