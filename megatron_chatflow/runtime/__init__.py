"""Processes, devices, parallel groups, seeds, signals and exit reporting."""
