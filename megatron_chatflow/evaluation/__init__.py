"""Validation loss per source, held-out text, multiple choice, and lm-eval tasks."""
