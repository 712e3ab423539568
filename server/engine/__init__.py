"""The `Engine` protocol, and the engine of this process: continuous batching with a blend a request."""
