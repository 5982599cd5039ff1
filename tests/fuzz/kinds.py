"""Lists all kinds of files that are fuzzed, by name."""

from fuzz import kinds_data, kinds_model, kinds_text
from fuzz.case import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (*kinds_text.KINDS, *kinds_data.KINDS, *kinds_model.KINDS)
}
