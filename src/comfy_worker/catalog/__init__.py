"""Named workflows with parameters: graphs in files, manifests beside them, and no code."""
