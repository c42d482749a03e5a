"""Bytes <-> named tensors: safetensors with distrust, the formats of the serving engines, output folders, journals."""
