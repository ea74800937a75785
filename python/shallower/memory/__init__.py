"""The memory that a step needs (``plan``), and smaller steps where it is not free (``retry``)."""
