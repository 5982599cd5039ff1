"""Cleans text corpora: filters, decontamination and fuzzy deduplication, run by datatrove.

`texts` has what is done to a single text, `decontaminate` finds texts of evaluation files, `steps`
makes datatrove's pipeline steps of both, and `job` runs them. Only `steps` and functions of `job`
import datatrove, which is an optional dependency.
"""
