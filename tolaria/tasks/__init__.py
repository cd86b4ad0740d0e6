"""Tasks that train on data found on every machine."""
