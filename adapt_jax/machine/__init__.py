"""The machine of a run: devices, processes, compilation, signals and progress."""
