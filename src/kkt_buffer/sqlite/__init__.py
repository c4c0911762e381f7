"""The SQLite backend: one file, used by any number of processes on one machine."""
