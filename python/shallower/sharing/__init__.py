"""One work divided among workers or shards, and put together."""
