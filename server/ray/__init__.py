"""Replicas and their edge as deployments of Ray Serve. Ray is imported by functions, when they are called."""
