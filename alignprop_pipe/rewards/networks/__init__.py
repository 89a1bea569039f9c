"""Networks that rewards ask: their weights, their preprocessing, and CLIP."""
