"""Units of work (``units``), and the processes and Ray actors that do them."""
