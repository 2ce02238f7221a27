"""The pipelines: what a user calls, around the models."""
