"""Picture files and their scores: the pixels, the prompts in them, a reward on trial."""
