"""What a fleet of replicas would do: a discrete-event simulation fed with measured times."""
