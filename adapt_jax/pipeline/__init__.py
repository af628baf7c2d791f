"""A run from its inputs to its report: stages, state, resume."""
