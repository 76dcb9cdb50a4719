"""Probes, checks, statistics and the gate: what a lesson must show to be kept (no torch)."""
