"""The routes, one module per subject; `add_routes` of each registers them."""
