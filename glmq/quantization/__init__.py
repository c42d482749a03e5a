"""A checkpoint, its statistics and a recipe -> a quantized checkpoint. No model is run."""
