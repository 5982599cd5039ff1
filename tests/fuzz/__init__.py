"""Fuzzes every kind of file that the project reads. See `README.md` beside this file."""
