"""The shell: the only place for typer and rich."""
