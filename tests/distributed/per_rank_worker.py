"""Runs the entry point with different flags on each rank, as if nodes were configured differently.

``per_rank_worker.py FLAGS pretrain-arguments...``, where FLAGS is a JSON list of lists: the
additional flags of rank 0, of rank 1, and so on.
"""

import json
import os
import sys

from megatron_chatflow.errors import run_main
from megatron_chatflow.pretrain import main

if __name__ == "__main__":
    sys.argv += json.loads(sys.argv.pop(1))[int(os.environ["RANK"])]
    run_main(main)
