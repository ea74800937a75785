"""Memory and time of work before it is done."""
