"""The HTTP edge, settings, command line, and the life of a request."""
