"""Command line, recipes and cluster launching: the top of the dependency order."""
