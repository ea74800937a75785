"""What each result tells, as plain values."""
