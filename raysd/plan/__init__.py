"""What a run will need, before it is paid for: memory a worker, steps, seconds and cost. Nothing is allocated."""
