"""What was measured, as plain values with their errors, read and written as JSON."""
