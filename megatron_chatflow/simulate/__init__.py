"""The GPU that is not there: what a run on GPUs would do, found out on any machine.

`run.simulate` executes the CUDA path on tensors that have sizes but no values: it starts `worker`
in a process of its own, which makes `device` appear as the machine's GPU, joins a job of any size
(`process_group`), lets the entry point of training run two steps and a validation, and accounts in
`mode` for every operator. `report` describes the result.

`step_time` predicts the time of a training step, and `layout_search` chooses a parallel layout by
it. Training never imports this package.
"""
