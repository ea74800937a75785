"""Units of work, and those who do them: processes and Ray actors."""
