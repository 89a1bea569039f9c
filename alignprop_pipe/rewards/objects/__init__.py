"""Rewards that count and find objects: the detector, what to look for, and how prompts name it."""
