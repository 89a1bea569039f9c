"""What decides a run: its choices, the settings with their checks, the presets, and the text form of a reward."""
