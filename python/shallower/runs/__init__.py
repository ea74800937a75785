"""Over whole studies: sweeps of many, the page of a folder (``report``), and the demo."""
