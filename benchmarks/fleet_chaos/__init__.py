"""A fleet under load whose parts are killed and disconnected: each accepted job must end once."""
