"""A W8A8S checkpoint -> one part per tensor-parallel rank, and back."""
