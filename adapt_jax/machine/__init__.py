"""The machine a run is on: devices, processes, the compiler, signals, progress."""
