"""The GPU that is not there: what a run on GPUs would do, computed on any machine.

`step_time` predicts the time of a training step, and `layout_search` chooses a parallel layout by
it. Training never imports this package.
"""
