"""Figures against thresholds, a baseline and a history."""
