"""Tables of slides and patients: labels, splits, bags, batches."""
