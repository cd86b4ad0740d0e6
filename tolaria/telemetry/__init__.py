"""What a run tells: typed events and metrics for machines, progress and a summary for people."""
