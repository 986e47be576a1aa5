"""Agg of models that were trained from a common base: what each has learned is a difference from it."""
