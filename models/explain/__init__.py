"""Which tiles a prediction comes from."""
