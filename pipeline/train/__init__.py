"""Training, cross-validation and testing of slide classifiers."""
