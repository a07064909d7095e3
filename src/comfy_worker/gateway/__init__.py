"""The HTTP service: jobs of all doors, kept in a database, run by an engine."""
