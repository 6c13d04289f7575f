"""Putting reconstructions into the model: the replacement itself, and the model classes that attach SAEs."""
