"""What a run leaves behind: its folder, the summary of its evidence, drawings and the report."""
