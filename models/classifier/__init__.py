"""The slide classifier: training objective, selection, checkpoints, ensembles."""
