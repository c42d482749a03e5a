"""What a GLM-4.1V or GLM-4.6V-Flash is: its config.json layouts, its tensors and groups, its blocks, its inputs."""
