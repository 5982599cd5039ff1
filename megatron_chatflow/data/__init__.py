"""Data: indexed files, samples, packing, shuffling, sources and the loader.

A dataset is a pair of files (`indexed`) with a sidecar that records its origin (`sidecar`). Samples
are windows over its tokens (`samples`) or packed documents (`packing`). A `Source` shuffles the
samples of its datasets in every epoch (`permutation`), and the `Loader` assembles global batches in
the order of the blend. `fingerprint` and `contents` recognize changed data; `findings` reports
suspicious data.
"""
