"""Checkpoints in torch's distributed format, written while training continues."""
