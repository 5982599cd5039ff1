"""Bindings of `csrc`, each beside the NumPy or torch reference that defines it.

In: arrays. Out: arrays, the same ones from both.
"""
