"""One file for each scorer of whole pictures."""
