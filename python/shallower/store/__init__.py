"""What was measured, found again by all that it depends on."""
