"""A run's telemetry as Leyline packets, for whoever subscribes."""
