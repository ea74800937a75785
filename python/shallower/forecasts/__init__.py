"""What a command will take (memory and time), and what a cut saves (``gain``)."""
