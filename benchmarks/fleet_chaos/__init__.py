"""A fleet under load, all of whose parts are killed and cut off from each other: what it accepted ends, once."""
