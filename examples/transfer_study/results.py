"""The results of the study, ``results.json``.

Each entry has a digest of what determines its weights and one of what evaluates them. Runs whose
entry has the same digests are not trained again, on whatever machine.

A foundation that is built again on another machine may have other last bits. Each entry therefore
has a hash of the values of the weights it started from, and only runs with the same hash are
compared.
"""

import json
from pathlib import Path
from typing import Any

from examples.transfer_study.study import Run, Study, make_config, plan, training_digest
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

FORMAT_VERSION = 2


class Results:
    """The results of a study, ``results.json``. Every change is written at once, atomically.

    Attributes:
        path: The file.
        entries: Results by `Run.key`, with a hash of the foundation after it for those that repeat
            a run from other weights.
        models: Digests and sizes of the text of each model, as of its last preparation.
        foundations: Results of the foundations, by model and hash of the weights.
        proposals: Proposed schedules with their predictions, by model.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file if it exists.

        Raises:
            UserError: It is damaged or of another format.
        """
        self.path = path
        self.entries: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.foundations: dict[str, Any] = {}
        self.proposals: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            self.entries, self.foundations = content["runs"], content["foundations"]
            self.models, self.proposals = content["models"], content["proposals"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the results of a study ({error}); delete it or give another --results"
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: has format {version}, not {FORMAT_VERSION}; give another --results"
            )

    def write(self) -> None:
        """Writes the file, with one line for each entry."""
        sections = {
            "models": self.models,
            "foundations": self.foundations,
            "proposals": self.proposals,
            "runs": {key: self.entries[key] for key in sorted(self.entries)},
        }
        lines = [f'"format_version": {FORMAT_VERSION}']
        for name, entries in sections.items():
            shown = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
            lines.append(f'"{name}": {{\n' + ",\n".join(shown) + "\n}")
        write_output_file(self.path, "{\n" + ",\n".join(lines) + "\n}\n")

    def digest(self, run: Run, study: Study) -> str | None:
        """Returns the digest that a run has now; None if its model was never prepared."""
        facts = self.models.get(run.model)
        if facts is None or (run.is_proposed and run.model not in self.proposals):
            return None
        config = make_config(run, study, self.proposals)
        return training_digest(config, facts["corpus"], facts["foundation"])

    def of_run(self, run: Run, study: Study) -> list[dict[str, Any]]:
        """Returns the current entries of a run: one for each foundation that it started from."""
        digest = self.digest(run, study)
        return [
            entry
            for key, entry in self.entries.items()
            if (key == run.key or key.startswith(run.key + "/")) and entry["digest"] == digest
        ]

    def current(self, study: Study) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the entries that belong to the study as it is now, and why others do not."""
        runs = {run: self.digest(run, study) for run in plan(study)}
        kept, left_out = {}, {}
        for key in sorted(self.entries):
            entry = self.entries[key]
            run = Run.of(entry)
            if run not in runs:
                left_out[key] = "not in the plan"
            elif entry["digest"] != runs[run]:
                left_out[key] = "configuration or corpus has changed"
            elif entry["evaluation"] != self.models[run.model]["evaluation"]:
                left_out[key] = "evaluated on other text"
            else:
                kept[key] = entry
        return kept, left_out

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Adds a result and writes the file. It replaces one of the same foundation, or an old one.

        Entries of one run and several foundations stay beside each other.
        """
        key = run.key
        known = self.entries.get(key)
        if known is not None and known["digest"] == entry["digest"]:
            if known["foundation"] != entry["foundation"]:
                key += "/" + entry["foundation"][:8]
        else:
            for old in [one for one in self.entries if one.startswith(run.key + "/")]:
                del self.entries[old]
        self.entries[key] = entry
        self.write()
