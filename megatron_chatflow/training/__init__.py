"""Training: the optimizer, one step, the loop, and the hooks that watch it."""
