"""How good a model is: losses, scores of its pictures with their uncertainty, and a report of both."""
