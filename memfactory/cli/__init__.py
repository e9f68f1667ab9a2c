"""The `memfactory` command: one module per verb."""
