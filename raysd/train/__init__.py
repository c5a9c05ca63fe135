"""Training: the loop and its engines, checkpoints, the worker that Ray Train runs, and the launch of a run."""
