"""The HTTP service: serves the APIs, keeps jobs in a database, and has an engine run them."""
