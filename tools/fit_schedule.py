#!/usr/bin/env python
"""Runs ``chatflow fit-schedule`` from a checkout."""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

from megatron_chatflow.cli.fit_schedule import main
from megatron_chatflow.errors import run_main

if __name__ == "__main__":
    run_main(main)
