"""A soak test: thousands of small jobs through the real worker while random faults are injected."""
