"""Fitting a router: train an embedder, cluster, classify, calibrate. To serve, only joining is needed."""
