"""The catalog: named workflows with parameters, each a graph in a file with a manifest beside it."""
