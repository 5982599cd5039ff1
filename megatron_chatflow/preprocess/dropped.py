"""Limits the share of records that a job may drop, and gives advice for each reason."""

from collections.abc import Mapping
from typing import Any

from megatron_chatflow.errors import UserError

DEFAULT_MAX_SHARE = 0.5
# Reasons that the user's choice of the job's data accounts for: these records do not count as
# dropped, but they count as records.
_REQUESTED = ("duplicate", "low_score", "no_language_")
_HINTS = {
    "malformed_json": "rename a JSON array to .json, and tab-separated pairs to .tsv or .txt",
    "not_an_object": "each line must be a JSON object",
    "not_utf8": "set --encoding",
    "no_key_": "set --json-keys, --pair-keys for pairs, or --chat-keys for chats",
    "not_text_": "set another key with --json-keys, or --pair-keys for pairs",
    "no_chat_key": "name the keys with --chat-keys",
    "several_questions_or_answers": "name the keys with --chat-keys",
    "unknown_role": "rename the role, or name its key with --chat-keys role=KEY",
    "two_": "see --consecutive-turns",
    "system_turn_not_first": "the built-in templates cannot represent it: see --chat-template",
    "tool_not_in_template": "use another --chat-template",
    "function_not_in_template": "use another --chat-template",
    "tools": "use a --chat-template with tools",
    "tool_calls": "use a --chat-template with tools",
    "no_language_": "set the languages with --pair-keys or --pair-languages",
    "no_tab": "pairs must be two columns separated by a tab, or JSON in a .jsonl file",
    "wrong_number_of_columns": "the texts may contain tabs: convert them to jsonl",
    "empty": "check the key",
    "malformed_csv": "cells with quotation marks must be quoted, and the marks doubled",
    "score_not_a_number": "check --pair-score",
    "low_score": "see --pair-min-score",
    "length_ratio": "see --pair-max-length-ratio",
    "different_numbers": "see --pair-numbers",
    "punctuation_ratio": "see --pair-max-punctuation-ratio",
    "wrong_language": "see --pair-identify-languages",
    "wrong_script": "check --pair-scripts and the order of the two sides",
    "identical_sides": "check whether one side is a copy of the other",
    "record_too_large": "see --max-record-bytes",
    "template_limit": "correct the chat template",
    "too_long": "see --max-tokens and --over-long",
    "no_loss_tokens": "see --max-tokens",
}


def hint_of(reason: str) -> str:
    """Returns advice for records dropped for ``reason``, or an empty string."""
    for name, hint in _HINTS.items():
        if reason == name or (name.endswith("_") and reason.startswith(name)):
            return hint
    return ""


def check_dropped_share(sidecar: Mapping[str, Any], prefix: object, max_share: float) -> None:
    """Checks that a job kept at least one document and dropped no more than the allowed share.

    The counts are those of the dataset's sidecar. Duplicates, pairs with a low score and units
    without one of the languages count as records but not as dropped, because they are dropped on
    request. Header lines are not records.

    Raises:
        UserError: No document is left, or too many records were dropped.
    """
    dropped: dict[str, int] = sidecar["dropped"]
    num_kept = sidecar["num_documents"]
    if num_kept == 0:
        counts = ", ".join(
            f"{n} {reason}{(hint := hint_of(reason)) and f' ({hint})'}"
            for reason, n in sorted(dropped.items(), key=lambda item: -item[1])
        )
        raise UserError(f"no document left: {prefix}: dropped: {counts or 'nothing'}")
    if (sidecar["settings"].get("pairs") or {}).get("direction") == "both":
        num_kept //= 2  # each record yields two documents
    requested = {reason: n for reason, n in dropped.items() if reason.startswith(_REQUESTED)}
    counted = {reason: n for reason, n in dropped.items() if reason not in {*requested, "header"}}
    num_dropped = sum(counted.values())
    num_records = num_dropped + num_kept + sum(requested.values())
    if num_dropped <= max_share * num_records:
        return
    reason = max(counted, key=lambda name: counted[name])
    hint = hint_of(reason)
    raise UserError(
        f"too many records dropped: {prefix}: {num_dropped} of {num_records}, {counted[reason]} "
        f"of them {reason}{hint and f' ({hint})'}: correct the input, or raise "
        f"--max-dropped-share ({max_share:g})"
    )
