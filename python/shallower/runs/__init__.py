"""Over whole studies: the page of a folder (``report``), and the demo."""
