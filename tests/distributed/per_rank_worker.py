"""The entry point with flags of each rank's own, as if its node were set up otherwise.

``per_rank_worker.py FLAGS pretrain-arguments...``, where FLAGS is a JSON list: the flags that rank
0 has besides, those of rank 1, and so on.
"""

import json
import os
import sys

from megatron_chatflow.errors import run_main
from megatron_chatflow.pretrain import main

if __name__ == "__main__":
    sys.argv += json.loads(sys.argv.pop(1))[int(os.environ["RANK"])]
    run_main(main)
