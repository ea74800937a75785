"""The comparison of all layers: hidden states streamed, compared by the core, kept in a scan."""
