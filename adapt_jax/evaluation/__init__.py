"""What a model is worth: perplexity, and tasks of lm-evaluation-harness."""
