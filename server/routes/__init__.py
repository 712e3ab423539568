"""The HTTP routes, one file a group."""
