"""The modes of `--mode`, one file for each."""
