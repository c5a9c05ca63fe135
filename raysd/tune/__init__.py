"""A search over training runs: Ray Tune chooses settings, each trial is a run of `raysd.train` with its own checkpoints.

Ray Tune's own state is pickle and is never read: what has been tried lies in `searches/<name>/trials/*.json`, and a
search that goes on replays these records to a new searcher and scheduler, in milliseconds a trial.
"""
