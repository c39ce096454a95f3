"""Detectors: one in each file, whose name is its id. The contract is experiments/detector.py."""
