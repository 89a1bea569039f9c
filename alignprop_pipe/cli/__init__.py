"""The command line: thin commands (`app`), their flags (`options`) and everything they say (`console`)."""
