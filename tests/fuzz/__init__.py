"""A fuzzer of every kind of file that the project reads; see `README.md` beside this file."""
