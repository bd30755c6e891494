"""Models to train, quantize and measure."""
