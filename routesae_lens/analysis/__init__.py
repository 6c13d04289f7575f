"""Measuring trained SAEs."""
