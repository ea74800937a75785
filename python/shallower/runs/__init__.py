"""The stages joined: the whole way from a model to a shallower one, and the demo."""
