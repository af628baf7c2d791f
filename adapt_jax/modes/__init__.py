"""What `--mode` names: one file a mode."""
