"""Checkpoints: the distributed store, and conversion to and from Hugging Face."""
