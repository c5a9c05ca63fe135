"""Generations, what people said of them, and the data set that becomes of it."""
