"""Statistics of routed experts, and the criteria that choose by them."""
