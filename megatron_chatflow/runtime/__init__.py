"""Where a run takes place: processes, devices, parallel groups, seeds and signals."""
