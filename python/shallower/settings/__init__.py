"""Settings of studies and stages, whose fields are the options of the commands."""
