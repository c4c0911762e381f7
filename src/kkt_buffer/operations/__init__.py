"""The operations of a buffer, a file for each subject."""
