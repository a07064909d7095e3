"""A gateway that is killed repeatedly under load: each accepted job must end once."""
