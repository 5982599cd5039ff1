"""Benchmarks that compare this project with its peers; ``tools/benchmark.py`` runs them.

One module per subject: ``blend``, ``loader``, ``preprocess``, ``checkpoint``, ``kernels`` and
``train``. Each offers ``add_arguments(parser)`` and ``run(arguments)``, see ``harness.Benchmark``.
The package is imported as ``benchmarks``, with ``tools/`` on the path.
"""
