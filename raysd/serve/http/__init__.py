"""Serving over HTTP: OpenAI's Images API, Replicate's predictions, feedback, and who may use them."""
