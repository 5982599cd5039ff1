"""Checkpoints: a training state in a distributed store, written while training goes on."""
