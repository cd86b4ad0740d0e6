"""Where a run's numbers and events go beside its own files, each sink behind a thread and a queue of its own."""
