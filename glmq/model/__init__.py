"""What GLM-4.1V is: its config.json layouts, its tensors and groups, its blocks, its inputs."""
