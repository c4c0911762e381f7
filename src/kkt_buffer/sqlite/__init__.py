"""The embedded engine: one file, opened by any number of processes of one machine."""
