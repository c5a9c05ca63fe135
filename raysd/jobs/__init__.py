"""raysd's commands as jobs of somebody else's cluster: submitted, followed, stopped. Needs no Ray until one is asked."""
