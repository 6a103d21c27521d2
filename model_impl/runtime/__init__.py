"""Running the model: key-value cache, sampling, generation."""
