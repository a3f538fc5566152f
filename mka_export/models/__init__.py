"""What a model is, and how to run it layer by layer."""
