"""Runs tools/preprocess_data.py and kills its whole process group at a given moment.

The arguments are `STAGE NUMBER LAST_INDEX`, followed by the tool's own. SIGKILL ends the process
just before the NUMBER-th time (from 1) that it opens a file for writing, renames or removes one in
this stage of the job, or as soon as the job is past that stage. How much of a file has been written
by then is left to chance, so partial files may be empty, truncated or complete.

`LAST_INDEX` is the `.idx` of the job's last output. Once it exists, merging is complete.
"""

import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
STAGES = ("making", "merging", "removing")
CHANGES = ("open", "os.rename", "os.remove")


def _stage_of(path: str, last_index: Path, prefix: str) -> str | None:
    """Returns the stage in which a job changes a file, or None if the file is not the job's."""
    if not path.startswith(prefix):
        return None
    if last_index.exists():
        return "removing"
    return "making" if re.search(r"_part\d+of\d+_", path) else "merging"


def kill_in(stage: str, number: int, last_index: Path, prefix: str) -> None:
    """Installs an audit hook that kills this process at the given moment."""
    counts = dict.fromkeys(STAGES, 0)

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        now = _stage_of(str(arguments[0]), last_index, prefix)
        if now is None:
            return
        counts[now] += 1
        is_past = STAGES.index(now) > STAGES.index(stage)
        if is_past or (now == stage and counts[now] == number):
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(before)


if __name__ == "__main__":
    stage, number, last_index, *arguments = sys.argv[1:]
    prefix = arguments[arguments.index("--output-prefix") + 1]
    kill_in(stage, int(number), Path(last_index), prefix)
    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")
