"""Token data: indexed files on disk, samples cut from them, and the blend that orders the samples.

In: `.bin/.idx` datasets that `preprocess` or Megatron-LM wrote. Out: global batches.
"""
