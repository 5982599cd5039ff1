"""Runs tools/preprocess_data.py and kills its whole process group at a given moment.

In: `STAGE NUMBER LAST_INDEX`, then the tool's own arguments. Out: nothing; the process dies by
SIGKILL just before the NUMBER-th time (from 1) that it opens for writing, renames or removes a file
in a stage of the job, or as soon as the job is past that stage. What of a file has been written by
then is left to chance, so partial files may be empty, torn or whole.

`LAST_INDEX` is the `.idx` of the job's last output, whose presence says that all is merged.
"""

import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
STAGES = ("making", "merging", "removing")
CHANGES = ("open", "os.rename", "os.remove")


def _stage_of(path: str, last_index: Path, prefix: str) -> str | None:
    """The stage in which a job changes a file; None for a file that is not its own."""
    if not path.startswith(prefix):
        return None
    if last_index.exists():
        return "removing"
    return "making" if re.search(r"_part\d+of\d+_", path) else "merging"


def kill_in(stage: str, number: int, last_index: Path, prefix: str) -> None:
    """Arms this process."""
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
