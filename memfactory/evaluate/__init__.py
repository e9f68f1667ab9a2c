"""Evaluation: the same agent on held-out tasks, and the report of a run."""
