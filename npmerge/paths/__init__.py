"""Paths of low loss between two models, and the models on them."""
