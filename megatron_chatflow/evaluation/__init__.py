"""Loss per source, reports, generation and benchmark harness."""
