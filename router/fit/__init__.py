"""Fitting a router: train an embedder, cluster, classify, calibrate. Nothing here is needed to serve."""
