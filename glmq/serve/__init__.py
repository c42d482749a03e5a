"""Checkpoints of glmq in a real serving engine that needs no NPU: vLLM, by a plugin. The only room that may import vllm."""
