"""A stand-in for transformer-engine in plain PyTorch, for machines without CUDA.

It has the part that megatron-core needs for a dense GPT: modules, functions and optimizer with the
signatures, parameter names, shapes and collectives of version 2.9. `tensor/utils.py` is that of
2.12, with which megatron-core transposes FP8 weights after it has gathered them. Put
``tests/te_standin`` on the PYTHONPATH of a process of its own: where transformer-engine can be
imported, megatron-core takes its optimizer and other functions from it as well, whatever the
layers are.
"""

from transformer_engine import common, pytorch

__version__ = "2.9.0"
__all__ = ["common", "pytorch"]
