"""What the serving engines would look up in a folder, one module an engine."""
